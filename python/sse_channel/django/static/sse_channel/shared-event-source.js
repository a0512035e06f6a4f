/**
 * An `EventSource` that all tabs share: one of them holds the one connection and passes everything
 * on. It comes back by itself, also where a browser's own gives up.
 *
 *     const source = new SharedEventSource("/stream/");
 *
 * Use, options, races and limits: docs/javascript.md of sse_channel. (No line here shows how a page
 * loads it: Django's collectstatic would take it for a module that this one needs.)
 */

const CONNECTING = 0;
const OPEN = 1;
const CLOSED = 2;
const FINAL_STATUSES = [204, 401, 403];
const LONGEST_CHECK_MS = 5000; // so that the end of a sleep is noticed soon
const GATHER_MS = 250; // for the other tabs to tell a new holder where they are
const UNKNOWN_SILENCE_MS = 45_000; // until a heartbeat tells more
const SHORTEST_RETRY_MS = 500; // after a failure, also where the server says `retry: 0`
const SHORTEST_SILENCE_MS = 15_000;
const LOG_EVENTS = 1000;
const LOG_CHARACTERS = 4_000_000;
const NEWEST_NAMES = 100;

/**
 * Turns the bytes of one stream, cut anywhere, into its events: HTML standard, section 9.2.6. An
 * event that is not finished when the stream ends is none.
 */
export class EventStreamParser {
  retry = null; // milliseconds, once the stream has said so
  isHeartbeat = false; // whether the bytes that were fed last were comments and nothing else
  #decoder = new TextDecoder(); // takes the byte order mark off; what is no UTF-8 is U+FFFD
  #isAfterCR = false;
  #rest = "";
  #type = "";
  #data = [];
  #id;
  #hasId = false;

  constructor(lastEventId = "") {
    this.lastEventId = this.#id = lastEventId;
  }

  /** Take the next bytes, and give the events that they complete. */
  feed(bytes) {
    this.isHeartbeat = false;
    let text = this.#decoder.decode(bytes, { stream: true });
    if (text === "") return [];
    // The second half of a CRLF, whose first half has ended the line already.
    if (this.#isAfterCR && text.startsWith("\n")) text = text.slice(1);
    this.#isAfterCR = text.endsWith("\r");
    const lines = text.split(/\r\n|\n|\r/);
    lines[0] = this.#rest + lines[0];
    this.#rest = lines.pop();
    const events = [];
    for (const line of lines) {
      if (line === "") this.#end(events);
      else this.#take(line);
    }
    const written = lines.filter((line) => line !== "");
    this.isHeartbeat = written.length > 0 && written.every((line) => line.startsWith(":"));
    return events;
  }

  #take(line) {
    const colon = line.indexOf(":");
    const field = colon < 0 ? line : line.slice(0, colon);
    let value = colon < 0 ? "" : line.slice(colon + 1);
    if (value.startsWith(" ")) value = value.slice(1);
    if (field === "event") this.#type = value;
    else if (field === "data") this.#data.push(value);
    else if (field === "id" && !value.includes("\0")) [this.#id, this.#hasId] = [value, true];
    else if (field === "retry" && /^[0-9]+$/.test(value)) this.retry = Number(value);
  }

  #end(events) {
    this.lastEventId = this.#id;
    if (this.#data.length) {
      const data = this.#data.join("\n");
      events.push({ type: this.#type || "message", data, id: this.#id, hasId: this.#hasId });
    }
    [this.#type, this.#data, this.#hasId] = ["", [], false];
  }
}

/**
 * One connection that comes back by itself. It tells `owner` by `opened`, `received`, `lost` (it
 * will come back) and `stopped` (it will not). Time is the wall clock's, which goes on in a sleep.
 */
class Connection {
  lastEventId;
  #owner;
  #options;
  #abort = null; // of the request that is open; null while it waits to come back
  #timer;
  #since = 0; // when something was heard last, or when it began to wait
  #span = 0; // milliseconds from then on until it must act
  #pause; // milliseconds that the server wants between two connections
  #least = 0; // the same, with what the last answer wanted
  #failures = 0;
  #silence; // milliseconds without a byte after which a connection is dead
  #isLearning; // whether heartbeats tell how long that is
  #heartbeat = 0; // the longest time in milliseconds before a heartbeat

  constructor(owner, options, lastEventId) {
    this.#owner = owner;
    this.#options = options;
    this.lastEventId = lastEventId;
    this.#pause = options.retry;
    this.#silence = options.heartbeatTimeout ?? UNKNOWN_SILENCE_MS;
    this.#isLearning = options.heartbeatTimeout === undefined;
    this.#connect();
  }

  stop() {
    clearTimeout(this.#timer);
    this.#abort?.abort();
    this.#owner = null;
  }

  /** Do what is due by now. Timers of hidden tabs are late, so that others call this as well. */
  check() {
    if (this.#owner === null) return;
    const passed = Date.now() - this.#since;
    // Less than 0: the clock was set back.
    if (passed >= 0 && passed < this.#span) this.#plan();
    else if (this.#abort === null) this.#connect();
    else {
      // Too early, if the server is merely slow: so it gets longer, until a heartbeat tells more.
      if (this.#isLearning) this.#silence *= 2;
      this.#abort.abort();
      this.#lose(0, 0);
    }
  }

  /** Somebody waits, or the network is back: no longer than the server wants. */
  wake() {
    this.#failures = 0;
    if (this.#abort === null) this.#span = Math.min(this.#span, this.#least);
    this.check();
  }

  #plan() {
    clearTimeout(this.#timer);
    const left = this.#since + this.#span - Date.now();
    this.#timer = setTimeout(() => this.check(), Math.max(0, Math.min(left, LONGEST_CHECK_MS)));
  }

  #act(span) {
    this.#since = Date.now();
    this.#span = span;
    this.#plan();
  }

  async #connect() {
    const abort = (this.#abort = new AbortController());
    this.#act(this.#silence);
    let status = 0;
    let pause = 0;
    try {
      const response = await fetch(this.#address(), {
        cache: "no-store",
        credentials: this.#options.withCredentials ? "include" : "same-origin",
        headers: this.#headers(),
        signal: abort.signal,
      });
      status = response.status;
      pause = 1000 * (Number(response.headers.get("Retry-After")) || 0);
      const type = response.headers.get("Content-Type") ?? "";
      if (status === 200 && /^\s*text\/event-stream\s*(;|$)/i.test(type)) {
        await this.#read(response, abort.signal);
      }
    } catch {
      // The network's failure, or `abort`.
    }
    if (abort.signal.aborted) return;
    abort.abort(); // A body that nobody reads.
    if (FINAL_STATUSES.includes(status)) this.#owner.stopped(status);
    else this.#lose(status, pause);
  }

  async #read(response, signal) {
    this.#failures = 0;
    this.#owner.opened(new URL(response.url).origin);
    const parser = new EventStreamParser(this.lastEventId);
    const reader = response.body.getReader();
    for (;;) {
      const { done, value } = await reader.read();
      if (done || signal.aborted) return;
      const events = parser.feed(value);
      const passed = Date.now() - this.#since;
      if (parser.isHeartbeat && passed > 1000 && passed < this.#silence && this.#isLearning) {
        this.#heartbeat = Math.max(this.#heartbeat, passed);
        this.#silence = Math.max(3 * this.#heartbeat, SHORTEST_SILENCE_MS);
      }
      this.#act(this.#silence);
      this.#pause = parser.retry ?? this.#pause;
      const isMoved = parser.lastEventId !== this.lastEventId;
      this.lastEventId = parser.lastEventId;
      if (isMoved || events.length) this.#owner.received(events, parser.lastEventId);
      if (signal.aborted) return;
    }
  }

  #lose(status, pause) {
    this.#abort = null;
    const least = Math.max(pause, this.#pause, this.#failures > 0 ? SHORTEST_RETRY_MS : 0);
    this.#least = least;
    const most = Math.max(least, this.#options.maxRetry);
    // Never sooner than the server wants, and not all browsers in one instant.
    this.#act(Math.min(least * 2 ** this.#failures++, most) * (1 + Math.random() / 2));
    this.#owner.lost(status);
  }

  // The address says it too: a header of that name makes other origins ask first, and a server
  // of another make may read only one of both.
  #address() {
    const address = new URL(this.#options.url);
    const name = this.#options.lastEventIdParameter;
    if (!this.lastEventId || !name) return address;
    // Only then, since it writes the others anew.
    if (address.searchParams.has(name)) address.searchParams.delete(name);
    const parameter = `${encodeURIComponent(name)}=${encodeURIComponent(this.lastEventId)}`;
    address.search += (address.search ? "&" : "?") + parameter;
    return address;
  }

  #headers() {
    const headers = { Accept: "text/event-stream" };
    const isOwn = new URL(this.#options.url).origin === globalThis.location?.origin;
    // Other characters cannot stand in a header.
    if (isOwn && /^[!-~]+$/.test(this.lastEventId)) headers["Last-Event-ID"] = this.lastEventId;
    return headers;
  }
}

/** What a tab has had, for tabs that join or were away. */
class Memory {
  #log = new Map(); // from id to its event, null for an id without one; without a gap, in order
  #characters = 0;
  #newest = new Map(); // from name to its newest event
  #first = null; // what a connection began with, if that has no id: the server's first payload

  add(event, isLogged) {
    if (event.type === "stream-reset") return this.clear();
    if (event.isFirst) this.#first = event;
    // One that failed is no state of things.
    if (event.type !== "stream-error") {
      this.#newest.delete(event.type);
      this.#newest.set(event.type, event);
    }
    if (this.#newest.size > NEWEST_NAMES) this.#newest.delete(this.#newest.keys().next().value);
    if (event.hasId && isLogged) {
      this.#forget(event.id);
      this.#log.set(event.id, event);
      this.#characters += event.data.length;
    }
  }

  /** The stream is at `id` now. */
  mark(id) {
    if (id && !this.#log.has(id)) this.#log.set(id, null);
    while (this.#log.size > LOG_EVENTS || this.#characters > LOG_CHARACTERS) {
      this.#forget(this.#log.keys().next().value);
    }
  }

  has(id) {
    return this.#log.has(id);
  }

  /** The events after `id`; null when the log does not reach so far. */
  after(id) {
    if (!this.#log.has(id)) return null;
    const ids = [...this.#log.keys()];
    const events = ids.slice(ids.indexOf(id) + 1).map((later) => this.#log.get(later));
    return events.filter((event) => event !== null);
  }

  /** What shows the state of things: the first payload and the newest event of each name. */
  state() {
    const newest = [...this.#newest.values()];
    return this.#first && !newest.includes(this.#first) ? [this.#first, ...newest] : newest;
  }

  /** What follows has a gap before it. */
  clear() {
    this.#log.clear();
    this.#newest.clear();
    [this.#characters, this.#first] = [0, null];
  }

  #forget(id) {
    this.#characters -= this.#log.get(id)?.data.length ?? 0;
    this.#log.delete(id);
  }
}

/**
 * The interface of `EventSource`.
 *
 * All tabs ask for one lock; who has it is the holder and has the connection. A holder's time is a
 * *term*, and later ones have higher numbers. A new holder first asks the others where they are:
 * from then on each refuses what an older term sends, so that its answer stays true. The
 * connection goes on from the oldest of these places, and each tab skips what it has had after it.
 */
export class SharedEventSource extends EventTarget {
  #options;
  #name;
  #state = CONNECTING;
  #status = 0;
  #handlers = {};
  #listening = new AbortController(); // to the window's events, until the close
  #tab = `${Date.now()}-${Math.random()}`;
  #channel = null;
  #timer;
  #isInside = false; // false: closed, or asleep
  #candidacy = null; // aborted to withdraw it, or to give the lock back
  #connection = null; // the holder's
  #answers = null; // of the other tabs, while a new holder gathers them
  #gathered = null;
  #term = 0;
  #isJoined = false; // whether it has had everything since some moment
  #isSettled = false; // whether it takes events of this term
  #hello = 0; // the number of its newest one: an answer to an older one comes too late
  #unanswered = 0;
  #origin; // of the stream
  #isOpening = false;
  #memory = new Memory();
  #place = { term: 0, n: 0, id: "" }; // n counts what the term's holder has passed on
  #skip = new Set(); // ids it has had, which the stream will repeat

  constructor(url, options = {}) {
    if (!globalThis.ReadableStream || !("body" in Response.prototype)) {
      return new EventSource(url, options);
    }
    super();
    let address;
    try {
      address = new URL(url, globalThis.document?.baseURI ?? location.href).href;
    } catch {
      throw new DOMException(`"${url}" is no URL.`, "SyntaxError");
    }
    for (const name of ["heartbeatTimeout", "maxRetry", "retry", "takeoverTimeout"]) {
      if (options[name] !== undefined && !(options[name] > 0)) {
        throw new TypeError(`${name} must be a number of milliseconds, more than 0`);
      }
    }
    this.#options = {
      key: "",
      lastEventIdParameter: "last_event_id",
      maxRetry: 30_000,
      replay: true,
      retry: 3000,
      takeoverTimeout: 15_000,
      ...options,
      url: address,
      withCredentials: Boolean(options.withCredentials),
    };
    this.#origin = new URL(address).origin;
    this.#name = `sse_channel 1 ${JSON.stringify([address, this.withCredentials, this.#options.key])}`;
    const { signal } = this.#listening;
    const listen = (target, type, listener) => target?.addEventListener(type, listener, { signal });
    listen(globalThis, "pagehide", () => this.#leave());
    listen(globalThis, "pageshow", () => this.#comeBack());
    listen(globalThis.document, "freeze", () => this.#leave());
    listen(globalThis.document, "resume", () => this.#comeBack());
    listen(globalThis.document, "visibilitychange", () => this.#isVisible && this.#wake());
    listen(globalThis, "online", () => this.#wake());
    this.#enter();
  }

  get url() {
    return this.#options.url;
  }

  get withCredentials() {
    return this.#options.withCredentials;
  }

  get readyState() {
    return this.#state;
  }

  /** The status of the last answer, 0 for none: why it is lost or closed. */
  get status() {
    return this.#status;
  }

  /** Whether the connection is this tab's. */
  get isHolder() {
    return this.#connection !== null;
  }

  /** Leave; another tab goes on with the connection. */
  close() {
    this.#state = CLOSED;
    this.#listening.abort();
    this.#leave();
  }

  // --- Coming and going ---------------------------------------------------------------

  #enter() {
    this.#isInside = true;
    if (!navigator.locks || !globalThis.BroadcastChannel) return this.#goOn(this.#place.id);
    this.#channel = new BroadcastChannel(this.#name);
    this.#channel.onmessage = ({ data }) => this.#hear(data);
    this.#unanswered = 0;
    const pause = this.#options.takeoverTimeout / 3;
    this.#timer = setInterval(() => this.#ask(), pause * (1 + Math.random() / 5));
    this.#sayWhere("hello");
    this.#compete();
  }

  #leave() {
    this.#isInside = this.#isJoined = this.#isSettled = false;
    clearInterval(this.#timer);
    this.#withdraw();
    this.#channel?.close();
    this.#channel = null;
  }

  #comeBack() {
    if (this.#isInside || this.#state === CLOSED) return;
    this.#become(CONNECTING);
    // Unless a listener closed it.
    if (this.#state !== CLOSED) this.#enter();
  }

  #withdraw() {
    this.#candidacy?.abort();
    this.#connection?.stop();
    this.#candidacy = this.#connection = this.#answers = null;
  }

  async #compete(steal = false) {
    const candidacy = (this.#candidacy = new AbortController());
    const { signal } = candidacy;
    let isLost = false;
    try {
      await navigator.locks.request(this.#name, steal ? { steal } : { signal }, () => {
        if (signal.aborted) return undefined;
        this.#take(signal);
        return new Promise((release) => signal.addEventListener("abort", release));
      });
    } catch (error) {
      isLost = error.name !== "AbortError";
    }
    if (signal.aborted) return;
    this.#withdraw();
    if (isLost) {
      // No locks here after all, for example in a sandboxed frame.
      this.#leave();
      this.#isInside = true;
      this.#goOn(this.#place.id);
    } else {
      // Another tab took this one for asleep.
      this.#compete();
    }
  }

  // --- The holder ---------------------------------------------------------------------

  async #take(signal) {
    // The fraction keeps the terms of two apart that take in the same millisecond.
    const term = (this.#term = Math.max(this.#term + 1, Date.now() + Math.random()));
    const isOver = () => signal.aborted || this.#term !== term;
    this.#isSettled = false;
    this.#answers = [];
    this.#become(CONNECTING);
    const { pending } = await navigator.locks.query().catch(() => ({ pending: [] }));
    const others = pending.filter(({ name }) => name === this.#name).length;
    if (isOver()) return;
    if (others > 0) {
      await new Promise((resolve) => {
        this.#gathered = () => this.#answers?.length >= others && resolve();
        setTimeout(resolve, GATHER_MS);
        this.#sayWhere("ask");
        this.#gathered();
      });
    }
    if (isOver()) return;
    const older = ({ place: a }, { place: b }) => a.term - b.term || a.n - b.n;
    const joined = this.#answers.filter(({ isJoined }) => isJoined).sort(older);
    // One without an id cannot say from where.
    const oldest = joined.find(({ place }) => place.id) ?? joined[0];
    this.#answers = null;
    let from = this.#place;
    if (oldest && (!this.#isJoined || older(oldest, { place: from }) < 0)) from = oldest.place;
    if (oldest?.gift) this.#catchUp(oldest.gift);
    if (isOver()) return;
    this.#isJoined = this.#isSettled = true;
    this.#memory.mark(from.id);
    this.#moveTo(from.id);
    this.#place = { term, n: 0, id: from.id };
    this.#say("start", { id: from.id });
    this.#goOn(from.id);
  }

  #goOn(id) {
    const owner = {
      opened: (origin) => {
        this.#origin = origin;
        this.#isOpening = true;
        this.#pass("state", { state: OPEN, status: 200 });
      },
      received: (events, newest) => {
        const passed = events.map((event) => ({ ...event, origin: this.#origin }));
        if (this.#isOpening && passed.length) {
          const first = passed.find(({ type }) => type !== "stream-reset");
          if (first && !first.hasId) first.isFirst = true;
          this.#isOpening = first === undefined;
        }
        const place = { term: this.#term, n: this.#place.n + 1, id: newest };
        this.#pass("events", { events: passed, place });
      },
      lost: (status) => this.#pass("state", { state: CONNECTING, status }),
      stopped: (status) => this.#pass("state", { state: CLOSED, status }),
    };
    this.#connection = new Connection(owner, this.#options, id);
  }

  /** To the others first: who ends in between has kept nothing to itself. */
  #pass(kind, what) {
    this.#say(kind, what);
    if (kind === "events") this.#accept(what);
    else this.#become(what.state, what.status, true);
  }

  /** What a tab is given that is at `place`; `isFresh`: it has never been anywhere. */
  #giftFor({ place, isFresh, replay }) {
    const gift = { from: place.id, place: this.#place, isReset: false, events: [] };
    if (isFresh) return { ...gift, events: replay === false ? [] : this.#memory.state() };
    if (!place.id) return gift;
    const events = this.#memory.after(place.id);
    if (events !== null) return { ...gift, events };
    return { ...gift, isReset: true, events: this.#memory.state() };
  }

  // --- Between the tabs ---------------------------------------------------------------

  get #isFresh() {
    return !this.#isJoined && !this.#place.id;
  }

  get #isVisible() {
    return globalThis.document?.visibilityState !== "hidden";
  }

  #say(kind, what) {
    this.#channel?.postMessage({ kind, tab: this.#tab, term: this.#term, ...what });
  }

  #sayWhere(kind, what) {
    this.#say(kind, {
      hello: (this.#hello += 1),
      place: this.#place,
      isJoined: this.#isJoined,
      isFresh: this.#isFresh,
      replay: this.#options.replay,
      ...what,
    });
  }

  /** A tab that is looked at asks its holder for a sign of life, and makes it look at its timers. */
  #ask() {
    if (this.#candidacy === null || this.isHolder || this.#answers || !this.#isVisible) return;
    this.#unanswered += 1;
    if (this.#unanswered > 3) {
      this.#unanswered = 0;
      this.#candidacy.abort();
      this.#compete(true);
    } else if (this.#isSettled) this.#say("ping");
    else this.#sayWhere("hello");
  }

  #wake() {
    if (!this.#isInside) return;
    if (this.isHolder) this.#connection.wake();
    else this.#sayWhere("hello");
  }

  #hear(message) {
    const { kind, term } = message;
    if (kind === "hello") {
      if (this.#answers) {
        this.#answers.push(message);
        this.#gathered?.();
      } else if (this.#connection) {
        this.#connection.wake();
        this.#say("welcome", {
          to: [message.tab, message.hello],
          gift: this.#giftFor(message),
          state: this.#state,
          status: this.#status,
        });
      }
    } else if (kind === "ping") {
      if (!this.#connection) return;
      this.#connection.check();
      this.#say("beat");
    } else if (term >= this.#term) this.#follow(message);
  }

  #follow(message) {
    const { kind, term } = message;
    this.#unanswered = 0;
    if (term > this.#term) {
      this.#term = term;
      this.#isSettled = false;
      // This tab was taken for asleep; that it has lost the lock it will hear in a moment.
      this.#connection?.stop();
      this.#connection = this.#answers = null;
      this.#become(CONNECTING);
      if (!this.#isInside) return;
    }
    if (kind === "ask") {
      const isGiver = this.#isJoined && !message.isJoined;
      this.#sayWhere("hello", { gift: isGiver ? this.#giftFor(message) : null });
    } else if (kind === "start") {
      const { id } = message;
      this.#isSettled = this.#isJoined && (id === this.#place.id || this.#memory.has(id));
      if (this.#isSettled) {
        this.#place = { term, n: 0, id };
        this.#moveTo(id);
      } else this.#sayWhere("hello");
    } else if (kind === "welcome") {
      const [tab, hello] = message.to;
      if (tab !== this.#tab || hello !== this.#hello) return;
      this.#become(message.state, message.status);
      if (this.#isInside) this.#catchUp(message.gift);
    } else if (kind === "state" && (this.#isSettled || message.state === CLOSED)) {
      this.#become(message.state, message.status, true);
    } else if (kind === "events" && this.#isSettled) this.#accept(message);
  }

  /** Take the gift of a tab that has had everything up to `place`. */
  #catchUp({ from, place, isReset, events }) {
    const isState = isReset || this.#isFresh;
    this.#isJoined = this.#isSettled = true;
    if (isState) this.#memory.clear();
    this.#moveTo(from);
    if (isReset) this.#dispatch({ type: "stream-reset", data: '{"reason":"too-old"}', id: from });
    this.#accept({ events, place }, isState);
    this.#moveTo(place.id);
    // A stream that repeats what it sent in an older term may repeat these.
    if (isState) for (const { hasId, id } of events) if (hasId) this.#skip.add(id);
  }

  /** The stream goes on after `id`: what this tab has had of that it will skip. */
  #moveTo(id) {
    this.#skip = new Set((this.#memory.after(id) ?? []).map((event) => event.id));
  }

  #accept({ events, place }, isState = false) {
    this.#place = place;
    for (const event of events) {
      if (!this.#isInside) return;
      if (event.hasId && this.#skip.delete(event.id)) continue;
      // The state has gaps, the log has none.
      this.#memory.add(event, !isState);
      this.#dispatch(event);
    }
    this.#memory.mark(place.id);
  }

  #dispatch({ type, data, id, origin = this.#origin }) {
    this.dispatchEvent(new MessageEvent(type, { data, lastEventId: id, origin }));
  }

  /** `isNews`: even where the state is the same, as with each connection that fails. */
  #become(state, status = 0, isNews = false) {
    const before = this.#state;
    if (before === CLOSED) return;
    [this.#state, this.#status] = [state, status];
    if (state === CLOSED) this.close();
    if (state !== before || (isNews && state === CONNECTING)) {
      this.dispatchEvent(new Event(state === OPEN ? "open" : "error"));
    }
  }

  static {
    for (const [name, value] of Object.entries({ CONNECTING, OPEN, CLOSED })) {
      for (const place of [this, this.prototype]) {
        Object.defineProperty(place, name, { value, enumerable: true });
      }
    }
    for (const type of ["open", "message", "error"]) {
      Object.defineProperty(this.prototype, `on${type}`, {
        enumerable: true,
        get() {
          return this.#handlers[type] ?? null;
        },
        set(handler) {
          if (!(type in this.#handlers)) {
            this.addEventListener(type, (event) => this.#handlers[type]?.call(this, event));
          }
          this.#handlers[type] = typeof handler === "function" ? handler : null;
        },
      });
    }
  }
}
