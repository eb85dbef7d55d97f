// Checkpoints: a time line over the steps, and a table, newest first.

const NEWEST = 100;

function drawCheckpoints() {
  const host = sectionBody("checkpoints");
  fill(host, "parts", () => [make("div", {}), make("div", {})]);
  const [lines, list] = host.children;
  const runs = shownRuns().filter((run) => run.checkpoints.length);
  fill(lines, contentKey([], version), () => (runs.length ? [checkpointKey(), ...runs.map(timeLine)] : []));
  fill(list, contentKey(["checkpoints"]), () =>
    runs.length ? checkpointTable(runs) : make("p", { class: "empty" }, t("no_checkpoints")),
  );
}

function sectionBody(id) {
  return byId(id).querySelector(".body");
}

function checkpointKind(item) {
  return item.failed ? "failed" : item.kind;
}

function checkpointKey() {
  return make(
    "p",
    { class: "key-list" },
    ...["milestone", "snapshot", "final", "best", "failed"].map((kind) =>
      make(
        "span",
        { class: kind },
        make("span", { "aria-hidden": "true" }, `${SYMBOLS[kind]} `),
        kind === "failed" ? t("failed") : t(`kind_${kind}`),
      ),
    ),
  );
}

function timeLine(run) {
  const end = Math.max(
    run.state.total_steps ?? 0,
    run.series.to ?? 0,
    ...run.checkpoints.map((item) => item.step ?? 0),
    1,
  );
  const place = (step) => `${(1 + (98 * step) / end).toFixed(3)}%`;
  const line = draw(
    "svg",
    { class: "time-line", width: "100%", height: 26, role: "img", "aria-label": `${t("checkpoints")}: ${run.name}` },
    draw("line", { class: "rail", x1: "1%", x2: "99%", y1: 13, y2: 13 }),
    draw("line", { class: "done", x1: "1%", x2: place(Math.min(end, run.series.to ?? 0)), y1: 13, y2: 13 }),
    ...run.checkpoints
      .filter((item) => isNumber(item.step))
      .map((item) => {
        const kind = checkpointKind(item);
        const label = draw("title", {}, `${t("step")} ${integer(item.step)} · ${item.name} · ${kind}`);
        return draw(
          "text",
          { class: kind, x: place(item.step), y: 18, "text-anchor": "middle" },
          label,
          SYMBOLS[kind] ?? "●",
        );
      }),
  );
  const ends = make(
    "span",
    { class: "ends" },
    make("span", {}, manyRuns() ? shortName(run) : "0"),
    make("span", {}, integer(end)),
  );
  return make("div", {}, line, ends);
}

function checkpointTable(runs) {
  const rows = runs.flatMap((run) => run.checkpoints.map((item) => ({ run, item })));
  const newest = rows.sort((a, b) => String(b.item.time).localeCompare(String(a.item.time))).slice(0, NEWEST);
  const heads = ["step", ...(manyRuns() ? ["run"] : []), "kind", "name", "time", "took", "stall", "status"];
  const lines = newest.map(({ run, item }) =>
    make(
      "tr",
      {},
      make("td", {}, integer(item.step)),
      manyRuns() ? make("td", { class: "text" }, shortName(run)) : null,
      make(
        "td",
        { class: "text" },
        make(
          "span",
          { class: checkpointKind(item), "aria-hidden": "true" },
          `${SYMBOLS[checkpointKind(item)] ?? "●"} `,
        ),
        WORDS[`kind_${item.kind}`] ? t(`kind_${item.kind}`) : item.kind || NONE,
      ),
      make("td", { class: "text" }, item.name),
      make("td", {}, moment(item.time)),
      make("td", {}, duration(item.seconds)),
      make("td", {}, duration(item.stall_seconds)),
      make("td", { class: item.failed ? "text bad" : "text" }, checkpointStatus(item)),
    ),
  );
  return make(
    "div",
    { class: "wide tall", tabindex: "0", role: "region", "aria-label": t("checkpoints") },
    table(
      t("checkpoints"),
      heads.map((key) => t(key)),
      lines,
      true,
    ),
  );
}

function checkpointStatus(item) {
  return item.failed ? `${t("failed")}: ${item.failed}` : item.done ? t("written") : t("writing");
}
