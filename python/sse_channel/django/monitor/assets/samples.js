const KEPT_MS = 310_000;
const CLOCK_MS = 5000; // by which the clocks of two workers may differ

/**
 * The samples of the last five minutes, in order: one a second, as a rule.
 *
 * A tab that joins the stream of another one is told only what is newest, so the tabs tell each
 * other what they have, over a channel of that `name`.
 */
export class Samples {
  list = [];
  #channel;

  constructor(name, onMore) {
    this.#channel = new BroadcastChannel(name);
    this.#channel.onmessage = ({ data }) => {
      if (data === "ask") this.#channel.postMessage(this.list);
      else if (this.merge(data)) onMore();
    };
    this.#channel.postMessage("ask");
  }

  get newest() {
    return this.list.at(-1) ?? null;
  }

  /** Take those that are not known; tells whether there were any. All tabs are told the same ones. */
  merge(samples) {
    const known = new Map([...samples, ...this.list].map((sample) => [sample.t, sample]));
    const isMore = known.size > this.list.length;
    this.#keep([...known.values()].sort((a, b) => a.t - b.t));
    return isMore;
  }

  /** Take the one that has come now. */
  add({ t, seconds, series }) {
    const sample = { t, seconds, series };
    // What is much later was of a clock that has been set back since.
    const others = this.list.filter((other) => other.t < t + CLOCK_MS && other.t !== t);
    this.#keep([...others, sample].sort((a, b) => a.t - b.t));
  }

  #keep(samples) {
    const oldest = (samples.at(-1)?.t ?? 0) - KEPT_MS;
    this.list = samples.filter(({ t }) => t > oldest);
  }
}
