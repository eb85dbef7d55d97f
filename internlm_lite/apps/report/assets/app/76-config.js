// The config of each run with where its values came from, and what the run stood on.

function drawConfig() {
  const host = sectionBody("config");
  fill(host, `${language()}`, () => [make("div", { class: "line filters" }), make("div", { class: "list" })]);
  const [filters, list] = host.children;
  const runs = shownRuns();
  fill(filters, JSON.stringify([language(), state.diff, manyRuns()]), configFilters);
  showText(filters.querySelector("input"), state.key);
  filters.hidden = !runs.some((run) => run.config.length);
  fill(list, contentKey(["config"], state.key, state.diff), () => configTable(runs));
}

function configFilters() {
  const find = make("input", {
    type: "search",
    placeholder: t("search_config"),
    "aria-label": t("search_config"),
    "data-focus": "key",
  });
  find.addEventListener("input", () => choose({ key: find.value }));
  const difference =
    manyRuns() &&
    checkbox("diff", t("only_differences"), state.diff === "1", () => choose({ diff: state.diff ? "" : "1" }));
  return [find, difference || ""];
}

// One row a key; one column a run, and the origins when there is but one.
function configTable(runs) {
  const keys = [...new Set(runs.flatMap((run) => run.config.map((item) => item.key)))];
  if (!keys.length) return make("p", { class: "empty" }, t("no_config"));
  const maps = runs.map((run) => new Map(run.config.map((item) => [item.key, item])));
  const rows = keys.map((key) => ({ key, items: maps.map((map) => map.get(key)) })).filter(configWanted);
  if (!rows.length) return make("p", { class: "empty" }, t("no_match"));
  const heads = [t("key"), ...(runs.length > 1 ? runs.map(shortName) : [t("value"), t("origin")])];
  return make(
    "div",
    { class: "wide tall", tabindex: "0", role: "region", "aria-label": t("config") },
    table(
      t("config"),
      heads,
      rows.map((row) => configRow(row, runs.length > 1)),
    ),
  );
}

function configWanted({ key, items }) {
  const text = [key, ...items.map((item) => `${item?.value} ${item?.origin}`)].join(" ").toLowerCase();
  return text.includes(state.key.toLowerCase()) && (!state.diff || items.length < 2 || differs(items));
}

function differs(items) {
  return new Set(items.map((item) => item?.value)).size > 1;
}

function configRow({ key, items }, several) {
  const values = several
    ? items.map((item) => make("td", { class: "text code", title: item?.origin }, item?.value ?? NONE))
    : [
        make("td", { class: "text code" }, items[0].value),
        make("td", { class: "text origin" }, items[0].origin ?? NONE),
      ];
  const row = make("tr", {}, make("th", { scope: "row", class: "code" }, key), ...values);
  if (several && differs(items)) row.classList.add("differs");
  return row;
}

function drawEnvironment() {
  fill(sectionBody("environment"), contentKey(["env"]), () => {
    const runs = shownRuns().filter((run) => run.env && Object.keys(run.env).length);
    if (!runs.length) return make("p", { class: "empty" }, t("no_environment"));
    return runs.length > 1
      ? environmentTable(runs)
      : make(
          "dl",
          { class: "environment" },
          ...Object.entries(runs[0].env).flatMap(([key, value]) => [
            make("dt", {}, key),
            make("dd", {}, environmentText(value)),
          ]),
        );
  });
}

function environmentTable(runs) {
  const keys = [...new Set(runs.flatMap((run) => Object.keys(run.env)))];
  const rows = keys.map((key) => ({ key, items: runs.map((run) => ({ value: environmentText(own(run.env, key)) })) }));
  return make(
    "div",
    { class: "wide tall", tabindex: "0", role: "region", "aria-label": t("environment") },
    table(
      t("environment"),
      [t("key"), ...runs.map(shortName)],
      rows.map((row) => configRow(row, true)),
    ),
  );
}

function environmentText(value) {
  if (Array.isArray(value)) return value.join(" ");
  if (value && typeof value === "object")
    return Object.entries(value)
      .map(([key, item]) => `${key} ${item}`)
      .join(" · ");
  return String(value ?? NONE);
}
