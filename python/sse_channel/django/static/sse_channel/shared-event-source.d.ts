/** Types of shared-event-source.js; use, options, races and limits: docs/javascript.md. */

export interface SharedEventSourceOptions extends EventSourceInit {
  /**
   * Tabs share a connection only if their keys are equal, beside URL and `withCredentials`: the
   * user, for example. Default `""`.
   */
  key?: string;
  /** Whether a tab that joins is told the first payload and the newest event of each name. Default true. */
  replay?: boolean;
  /** Milliseconds until it comes back, as long as the server has not said so. Default 3000. */
  retry?: number;
  /** Milliseconds that it waits at the most while connections fail. Default 30000. */
  maxRetry?: number;
  /**
   * Milliseconds without a byte after which a connection is dead; `Infinity` for never. Default:
   * three times the server's own heartbeat, as it is seen.
   */
  heartbeatTimeout?: number;
  /**
   * Milliseconds without an answer after which a tab that is looked at takes the connection over.
   * Default 15000.
   */
  takeoverTimeout?: number;
  /** The parameter of the URL that carries the last event id; `""` for none. Default `"last_event_id"`. */
  lastEventIdParameter?: string;
}

/**
 * An `EventSource` whose connection is shared by all tabs of the origin, and that comes back by itself.
 *
 * It is `CLOSED` only after `close()` or an answer of 204, 401 or 403. Where `fetch` cannot stream, the
 * constructor returns a plain `EventSource`, which has neither `status` nor `isHolder`.
 */
export class SharedEventSource extends EventTarget implements EventSource {
  /** @throws {DOMException} `SyntaxError`: `url` is no URL. */
  constructor(url: string | URL, options?: SharedEventSourceOptions);

  static readonly CONNECTING: 0;
  static readonly OPEN: 1;
  static readonly CLOSED: 2;
  readonly CONNECTING: 0;
  readonly OPEN: 1;
  readonly CLOSED: 2;

  readonly url: string;
  readonly withCredentials: boolean;
  readonly readyState: 0 | 1 | 2;
  /** The HTTP status of the newest answer, 0 for none: tells why it is lost or closed. */
  readonly status: number;
  /** Whether this tab has the connection. */
  readonly isHolder: boolean;

  onopen: ((this: EventSource, event: Event) => any) | null;
  onmessage: ((this: EventSource, event: MessageEvent<string>) => any) | null;
  onerror: ((this: EventSource, event: Event) => any) | null;

  /** Stop listening; if this tab has the connection, another one goes on with it. */
  close(): void;

  addEventListener<K extends keyof EventSourceEventMap>(
    type: K,
    listener: (this: EventSource, event: EventSourceEventMap[K]) => any,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: (this: EventSource, event: MessageEvent<string>) => any,
    options?: boolean | AddEventListenerOptions,
  ): void;
  addEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject,
    options?: boolean | AddEventListenerOptions,
  ): void;
  removeEventListener<K extends keyof EventSourceEventMap>(
    type: K,
    listener: (this: EventSource, event: EventSourceEventMap[K]) => any,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(
    type: string,
    listener: (this: EventSource, event: MessageEvent<string>) => any,
    options?: boolean | EventListenerOptions,
  ): void;
  removeEventListener(
    type: string,
    listener: EventListenerOrEventListenerObject,
    options?: boolean | EventListenerOptions,
  ): void;
}

export interface ParsedEvent {
  /** The event's name, `"message"` when the stream gave none. */
  type: string;
  data: string;
  /** The newest id of the stream, `""` when it gave none yet. */
  id: string;
  /** Whether the id was given with this event. */
  hasId: boolean;
}

/** Turns the bytes of one event stream, cut anywhere, into its events (HTML standard, 9.2.6). */
export class EventStreamParser {
  /** The id to go on from, when the stream continues another one. */
  constructor(lastEventId?: string);
  /** What the next connection says as its last event id. */
  lastEventId: string;
  /** The reconnection time in milliseconds, once the stream has set it. */
  retry: number | null;
  /** Whether the bytes that were fed last were comments and nothing else. */
  isHeartbeat: boolean;
  /** Take the next bytes, and give the events that they complete. */
  feed(bytes: Uint8Array): ParsedEvent[];
}
