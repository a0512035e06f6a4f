{
  const SHOWN_ARTICLES = 50;
  const BUCKET_SECONDS = 5;
  const BUCKETS = 36;

  const byId = (id) => document.getElementById(id);
  const { stream, submit, now, total } = document.body.dataset;
  const articles = byId("articles");
  // What this clock is ahead of the server's, in ms: ages are measured with one clock.
  const skew = Date.now() - Date.parse(now);
  let knownTotal = Number(total);
  let eventCount = 0;
  let lastEventAt = null;
  let arrivals = [];

  // --- Articles ---------------------------------------------------------------------

  const shown = (id) => articles.querySelector(`article[data-id="${CSS.escape(id)}"]`);

  const localTime = (date) =>
    date.toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit", hourCycle: "h23" });

  // Put the element of an article in its place, newest on top; false if it is there already.
  const insert = (element) => {
    if (shown(element.dataset.id)) return false;
    const id = Number(element.dataset.id);
    const older = [...articles.children].find((other) => Number(other.dataset.id) < id);
    articles.insertBefore(element, older ?? null);
    prepare(element);
    while (articles.children.length > SHOWN_ARTICLES) articles.lastElementChild.remove();
    byId("empty").hidden = true;
    return true;
  };

  const prepare = (element) => {
    const time = element.querySelector("time");
    const created = new Date(time.dateTime);
    time.textContent = localTime(created);
    time.title = created.toLocaleString();
    arrivals.push(created.getTime() + skew);
  };

  const show = (article) => {
    const element = byId("article-template").content.cloneNode(true).querySelector("article");
    element.dataset.id = article.id;
    element.dataset.category = article.category ?? "";
    element.querySelector("time").dateTime = article.created_at ?? new Date().toISOString();
    for (const name of ["category", "source", "headline", "summary"]) {
      element.querySelector(`.${name}`).textContent = article[name] ?? "";
    }
    element.classList.add("entering");
    element.addEventListener("animationend", (event) => {
      if (event.animationName === "wash") element.classList.remove("entering");
    });
    return insert(element);
  };

  // What was published while no stream was open is in the page the server renders now.
  const catchUp = async () => {
    const response = await fetch(location.href);
    const page = new DOMParser().parseFromString(await response.text(), "text/html");
    page.querySelectorAll("#articles article[data-id]").forEach((element) => {
      insert(document.adoptNode(element));
    });
    drawTime();
  };

  // --- Statistics -------------------------------------------------------------------

  const rows = new Map();

  const categoryRow = (name) => {
    const row = document.createElement("li");
    row.dataset.category = name;
    for (const part of ["name", "track", "count"]) {
      row.appendChild(document.createElement("span")).className = part;
    }
    row.querySelector(".name").textContent = name;
    row.querySelector(".name").title = name;
    const fill = row.querySelector(".track").appendChild(document.createElement("div"));
    fill.className = "fill";
    byId("categories").append(row);
    rows.set(name, row);
    return row;
  };

  // One decimal is enough below 100, and none above; null is a dash.
  const short = (value) =>
    value?.toLocaleString([], { maximumFractionDigits: value < 100 ? 1 : 0 }) ?? "–";

  const showStatistics = (statistics) => {
    byId("total").textContent = statistics.total.toLocaleString();
    byId("per-minute").textContent = short(statistics.per_minute);
    byId("average-words").textContent = short(statistics.average_headline_words);
    const counts = Object.entries(statistics.categories);
    const most = Math.max(1, ...counts.map(([, count]) => count));
    rows.forEach((row, name) => {
      row.hidden = !(name in statistics.categories);
    });
    counts
      .sort(([a, m], [b, n]) => n - m || a.localeCompare(b))
      .forEach(([name, count], position) => {
        const row = rows.get(name) ?? categoryRow(name);
        // Moved by `order`: taking a row out to put it elsewhere would end its transition.
        row.style.order = position;
        row.querySelector(".fill").style.width = `${(100 * count) / most}%`;
        row.querySelector(".count").textContent = count;
      });
  };

  // --- What changes with time: ages and the chart -----------------------------------

  const age = (ms) => {
    const seconds = Math.max(0, Math.round(ms / 1000));
    if (seconds < 2) return "just now";
    if (seconds < 60) return `${seconds} s ago`;
    if (seconds < 3600) return `${Math.floor(seconds / 60)} min ago`;
    if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ago`;
    return `${Math.floor(seconds / 86400)} d ago`;
  };

  const chart = byId("chart");
  const bars = Array.from({ length: BUCKETS }, (_, position) => {
    const bar = document.createElementNS("http://www.w3.org/2000/svg", "rect");
    const step = chart.viewBox.baseVal.width / BUCKETS;
    bar.setAttribute("x", position * step + 1.5);
    bar.setAttribute("width", step - 3);
    if (position === BUCKETS - 1) bar.setAttribute("class", "current");
    return chart.appendChild(bar);
  });

  const drawChart = () => {
    const bucketOf = (ms) => Math.floor(ms / 1000 / BUCKET_SECONDS);
    const last = bucketOf(Date.now());
    arrivals = arrivals.filter((ms) => bucketOf(ms) > last - BUCKETS);
    const counts = new Array(BUCKETS).fill(0);
    // An article stamped a moment ahead of this clock counts as of now.
    arrivals.forEach((ms) => counts[BUCKETS - 1 - Math.max(0, last - bucketOf(ms))]++);
    const peak = Math.max(...counts);
    const height = chart.viewBox.baseVal.height;
    // A scale of at least 4 keeps a single article from looking like a rush.
    const unit = height / Math.max(4, peak);
    bars.forEach((bar, position) => {
      bar.setAttribute("y", height - counts[position] * unit);
      bar.setAttribute("height", counts[position] * unit);
    });
    byId("chart-peak").textContent = peak ? `peak ${peak}` : "none";
    const minutes = (BUCKETS * BUCKET_SECONDS) / 60;
    chart.setAttribute("aria-label", `${arrivals.length} articles in the last ${minutes} minutes`);
  };

  const drawTime = () => {
    byId("since").textContent = lastEventAt === null ? "–" : age(Date.now() - lastEventAt);
    for (const element of articles.children) {
      const created = Date.parse(element.querySelector("time").dateTime) + skew;
      element.querySelector(".age").textContent = age(Date.now() - created);
    }
    drawChart();
  };

  // --- The stream -------------------------------------------------------------------

  const STATES = { connecting: "Connecting…", live: "Live", reconnecting: "Reconnecting…", refused: "Refused" };
  let source = null;
  let isFirstMessage = false;

  const setState = (state) => {
    const element = byId("connection");
    if (element.dataset.state === state) return;
    element.dataset.state = state;
    element.querySelector(".text").textContent = STATES[state];
  };

  // What somebody has published to the channel that is no article: text, or any JSON.
  const announce = (message) => {
    const element = byId("announcement");
    element.textContent = message?.headline ?? (typeof message === "string" ? message : JSON.stringify(message));
    element.hidden = false;
  };

  const receive = (payload) => {
    eventCount += 1;
    lastEventAt = Date.now();
    byId("events").textContent = eventCount.toLocaleString();
    // In the first message of each stream: the one it reconnects to may be another worker's.
    if (payload.worker) byId("worker").textContent = payload.worker;
    if ("announcement" in payload) announce(payload.announcement);
    if (payload.article) {
      const isNew = show(payload.article);
      showStatistics(payload.statistics);
      const missed = payload.statistics.total - knownTotal - (isNew ? 1 : 0);
      // If it fails, the articles that arrive from now on are shown all the same.
      if (isFirstMessage && missed > 0) catchUp().catch(() => {});
      knownTotal = payload.statistics.total;
    }
    isFirstMessage = false;
    drawTime();
  };

  const connect = () => {
    source?.close();
    // One connection for all tabs that show as many.
    const opened = new SharedEventSource(`${stream}?last_n=${byId("last-n").value}`);
    source = opened;
    opened.onopen = () => {
      isFirstMessage = true;
      setState("live");
    };
    opened.onmessage = (event) => receive(JSON.parse(event.data));
    opened.onerror = () => {
      setState(opened.readyState === SharedEventSource.CLOSED ? "refused" : "reconnecting");
      byId("worker").textContent = "–";
    };
    document.querySelectorAll("[data-last-n]").forEach((element) => {
      element.textContent = byId("last-n").value;
    });
    byId("curl").textContent = `curl -N '${opened.url}'`;
  };

  byId("last-n").addEventListener("change", connect);

  // --- The form ---------------------------------------------------------------------

  byId("submit-form").addEventListener("submit", async (event) => {
    event.preventDefault();
    const form = event.target;
    const button = form.querySelector("button");
    const status = byId("submit-status");
    const article = { ...Object.fromEntries(new FormData(form)), source: "Reader desk" };
    button.disabled = true;
    let failure = "The server cannot be reached. Check that it is running, then try again.";
    try {
      const response = await fetch(submit, {
        method: "POST",
        headers: { "Content-Type": "application/json" },
        body: JSON.stringify(article),
      });
      failure = `The server answered ${response.status}. Try again.`;
      const answer = await response.json();
      failure = response.ok ? null : answer.error;
      if (response.ok) {
        status.textContent = `Published as article ${answer.id}.`;
        form.headline.value = "";
        form.summary.value = "";
        form.headline.focus();
      }
    } catch {
      // Said below: `failure` is what had not gone well up to here.
    }
    if (failure) status.textContent = failure;
    status.toggleAttribute("data-failed", Boolean(failure));
    button.disabled = false;
  });

  // --- Start ------------------------------------------------------------------------

  byId("bucket-seconds").textContent = BUCKET_SECONDS;
  byId("chart-start").textContent = `${(BUCKETS * BUCKET_SECONDS) / 60} min ago`;
  if (matchMedia("(max-width: 860px)").matches) byId("compose").open = false;
  [...articles.children].forEach(prepare);
  drawTime();
  setInterval(drawTime, 1000);
  connect();
}
