// News: the live page asks the dashboard every two seconds; a report can only load itself again.

const POLL = 2000;
const POLL_SLOWEST = 30000;
const RELOAD = 30000;
const REDRAW = 10000; // ages
const ENDED = ["done", "stopped", "failed", "log", "unreadable"];

let token = null;
let lostSince = null;
let pollTimer = null;
let details = new Map(); // run id -> finer series of the zoomed range
let detailVersion = 0;
let detailFor = "";

function startLive() {
  token = payload.token ?? null;
  if (payload.live) {
    document.addEventListener("visibilitychange", () => {
      if (!document.hidden) poll();
    });
    poll();
  } else {
    setInterval(() => {
      if (state.reload && !document.hidden) location.reload();
    }, RELOAD);
    setInterval(() => {
      drawStrip();
      drawFreshness();
    }, REDRAW);
  }
}

// One request at a time; none while nobody looks. Failures are retried ever more slowly.
let polling = false;

async function poll(wait = POLL) {
  clearTimeout(pollTimer);
  if (document.hidden || polling) return;
  polling = true;
  let next = POLL;
  try {
    await fetchNews();
    lostSince = null;
  } catch {
    if (!lostSince) announce(t("lost", clock(new Date().toISOString())));
    lostSince ??= new Date().toISOString();
    next = Math.min(POLL_SLOWEST, wait * 1.7);
  }
  polling = false;
  drawFreshness();
  pollTimer = setTimeout(poll, next, next);
}

async function fetchNews() {
  const address = token === null ? "api/runs" : `api/since?after=${encodeURIComponent(token)}`;
  const answer = await fetch(address, { cache: "no-store", signal: AbortSignal.timeout(20000) });
  if (answer.status === 304) return drawStrip();
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  const news = await answer.json();
  token = news.token ?? token;
  usePayload(news);
  render();
}

// On the live page a zoom brings the points that the whole range had no room for.
async function refine() {
  const wanted = JSON.stringify([state.zoom, state.x, state.runs, version]);
  if (!payload.live || wanted === detailFor) return;
  detailFor = wanted;
  const runs = state.zoom.length ? shownRuns().filter((run) => run.series.points > run.series.step.length) : [];
  try {
    const found = await Promise.all(runs.map(fetchSeries));
    if (detailFor !== wanted) return; // the reader has zoomed on meanwhile
    if (!found.length && !details.size) return;
    details = new Map(found.map((series, index) => [runs[index].id, series]));
    detailVersion += 1;
    render();
  } catch {
    if (detailFor === wanted) detailFor = ""; // the coarse points stay; the next drawing tries again
  }
}

async function fetchSeries(run) {
  const [from, to] = state.zoom.map((x) => stepOfX(run, x));
  const query = new URLSearchParams({ run: run.id, from: Math.floor(from), to: Math.ceil(to), points: 1000 });
  const answer = await fetch(`api/series?${query}`, { cache: "no-store", signal: AbortSignal.timeout(20000) });
  if (!answer.ok) throw new Error(`status ${answer.status}`);
  return answer.json();
}

function drawFreshness() {
  const left = payload.runs.some((run) => stale(run) !== null);
  const key = JSON.stringify([version, language(), lostSince, state.reload, token === null, left]);
  fill(byId("freshness"), key, () => {
    if (lostSince)
      return make("span", { class: "bad" }, make("span", { "aria-hidden": "true" }, "✕ "), t("lost", clock(lostSince)));
    if (payload.live)
      return [
        make("span", { class: "dot", "aria-hidden": "true" }),
        t(token === null ? "connecting" : payload.runs.some((run) => run.parsing) ? "reading" : "live"),
      ];
    if (payload.runs.every((run) => ENDED.includes(run.state.phase)))
      return t("written_final", moment(payload.generated));
    return [
      t("written_at", left ? moment(payload.generated) : clock(payload.generated)),
      checkbox("reload", t("auto_reload"), state.reload === "1", () => choose({ reload: state.reload ? "" : "1" })),
    ];
  });
}
