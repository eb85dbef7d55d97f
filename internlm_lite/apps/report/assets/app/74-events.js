// Alerts, and everything else that happened, newest first.

const EVENTS_SHOWN = 200;

function drawEvents() {
  const host = sectionBody("events");
  fill(host, `${language()}`, () => [
    make("div", { class: "alerts" }),
    make("div", { class: "line filters" }),
    make("div", { class: "list" }),
  ]);
  const [alerts, filters, list] = host.children;
  fill(alerts, contentKey(["alerts"]), alertList);
  const all = shownRuns().flatMap((run) => run.events.map((event) => ({ run, event })));
  const kinds = [...new Set(all.map(({ event }) => String(event.event)))].sort();
  fill(filters, JSON.stringify([language(), kinds, state.kind]), () => eventFilters(kinds));
  showText(filters.querySelector("input"), state.find);
  fill(list, contentKey(["events"], state.kind, state.find), () => eventList(all));
}

function alertList() {
  const alerts = shownRuns().flatMap((run) => run.alerts.map((alert) => ({ run, alert })));
  if (!alerts.length)
    return make("p", { class: "empty" }, make("span", { "aria-hidden": "true" }, "✓ "), t("no_alerts"));
  alerts.sort(
    (a, b) => Number(a.alert.over) - Number(b.alert.over) || String(b.alert.time).localeCompare(String(a.alert.time)),
  );
  return make(
    "ul",
    { tabindex: "0", "aria-label": t("alerts") },
    ...alerts
      .slice(0, EVENTS_SHOWN)
      .map(({ run, alert }) =>
        make(
          "li",
          { class: alert.over ? "over" : "active" },
          make("span", { class: "icon", "aria-hidden": "true" }, alert.over ? "△" : "▲"),
          make("strong", {}, alert.over ? t("alert_over") : t("alert_active")),
          make(
            "span",
            { class: "label" },
            [
              isNumber(alert.step) && `${t("step")} ${integer(alert.step)}`,
              moment(alert.time),
              manyRuns() && shortName(run),
            ]
              .filter(Boolean)
              .join(" · "),
          ),
          make("span", { class: "rule" }, alert.rule),
          make("span", { class: "what" }, alert.text),
        ),
      ),
  );
}

function eventFilters(kinds) {
  const find = make("input", {
    type: "search",
    placeholder: t("filter_events"),
    "aria-label": t("filter_events"),
    "data-focus": "find",
  });
  find.addEventListener("input", () => choose({ find: find.value }));
  const options = [["", t("all_kinds")], ...kinds.map((kind) => [kind, kind])];
  const box = select("kind", options, kinds.includes(state.kind) ? state.kind : "", (kind) => choose({ kind }));
  box.setAttribute("aria-label", t("event"));
  return [find, box];
}

function eventList(all) {
  const wanted = state.find.toLowerCase();
  const rows = all.filter(
    ({ event }) => (!state.kind || event.event === state.kind) && eventText(event).toLowerCase().includes(wanted),
  );
  if (!rows.length) return make("p", { class: "empty" }, t(all.length ? "no_match" : "no_events"));
  rows.sort((a, b) => String(b.event.time).localeCompare(String(a.event.time)));
  const lines = rows
    .slice(0, EVENTS_SHOWN)
    .map(({ run, event }) =>
      make(
        "tr",
        {},
        make("td", { class: "when" }, moment(event.time)),
        manyRuns() ? make("td", { class: "text" }, shortName(run)) : null,
        make("td", { class: `text event ${event.event}` }, event.event),
        make("td", { class: "text facts" }, facts(event)),
      ),
    );
  const heads = ["time", ...(manyRuns() ? ["run"] : []), "event", "facts"].map((key) => t(key));
  const scroll = make(
    "div",
    { class: "wide tall", tabindex: "0", role: "region", "aria-label": t("events") },
    table(t("events"), heads, lines, true),
  );
  return rows.length > EVENTS_SHOWN
    ? [scroll, make("p", { class: "hint" }, t("more_rows", rows.length - EVENTS_SHOWN))]
    : scroll;
}

function eventText(event) {
  return `${event.event} ${facts(event)}`;
}

// step 120 · name 121 · stall_seconds 0.41; the figures of folders stand in the charts and the table
function facts(event) {
  return Object.entries(event)
    .filter(([key, value]) => !["time", "seg", "event", "folders", "folder_tokens"].includes(key) && value !== null && value !== "")
    .map(([key, value]) => `${key} ${fact(value)}`)
    .join(" · ");
}

function fact(value) {
  if (isNumber(value)) return Number.isInteger(value) ? integer(value) : significant(value, 6);
  return typeof value === "object" ? JSON.stringify(value) : String(value);
}
