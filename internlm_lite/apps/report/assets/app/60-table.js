// The table of folders: one row a folder and shown run, sorted by any column.

const COLUMNS = [
  ["tokens_learnt", (f) => f.tokens, compact],
  ["share_short", (f) => f.share, (v) => percent(v, 1)],
  ["epochs", (f) => f.epochs, (v) => fixed(v, 2)],
  ["loss_now", (f) => f.loss, (v) => fixed(v, 4)],
  ["change", (f) => f.change, (v) => signed(v, 4)],
  ["acc_short", (f) => f.acc, (v) => percent(v, 2)],
  ["ppl_short", (f) => f.perplexity, (v) => perplexityText(v)],
  ["val_loss", (f) => f.val_loss, (v) => fixed(v, 4)],
  ["val_acc", (f) => f.val_acc, (v) => percent(v, 2)],
];

function drawTable() {
  const key = JSON.stringify([version, language(), dark(), state.sort, state.only, state.runs]);
  fill(byId("table"), key, () => {
    const rows = sortedRows();
    return rows.length ? folderTable(rows) : make("p", { class: "empty" }, t("no_values"));
  });
  const runs = shownRuns().filter(hasSteps);
  const note = t("table_note", ofRuns(runs, "window"), ofRuns(runs, "change_from"));
  byId("table-note").textContent = runs.length ? note : "";
}

// A number of the runs: one for all, or each with the name of its run.
function ofRuns(runs, key) {
  const texts = runs.map((run) => integer(run[key]));
  if (new Set(texts).size === 1) return texts[0];
  return runs.map((run, index) => `${shortName(run)} ${texts[index]}`).join(", ");
}

function folderTable(rows) {
  const heads = ["folder", ...(manyRuns() ? ["run"] : []), ...COLUMNS.map(([key]) => key)];
  return make(
    "table",
    { class: "numbers" },
    make("caption", { class: "hidden" }, t("folder_table")),
    make("thead", {}, make("tr", {}, ...heads.map(sortHead))),
    make("tbody", {}, ...rows.map(folderRow)),
  );
}

// sort is "column" or "-column"; without it the folders stand in the order of the data.
function sortHead(key) {
  const sorted = state.sort.replace("-", "") === key;
  const down = state.sort.startsWith("-");
  const arrow = make("span", { class: "arrow", "aria-hidden": "true" }, sorted ? (down ? "▼" : "▲") : "");
  const next = !sorted ? key : down ? "" : `-${key}`;
  const { window: lines, change_from: step } = shownRuns()[0];
  const hints = {
    epochs: t("hint_epochs"),
    loss_now: t("hint_window", integer(lines)),
    change: isNumber(step) ? t("hint_change", integer(lines), integer(step)) : null,
  };
  return make(
    "th",
    {
      scope: "col",
      title: hints[key],
      class: key === "run" ? "text" : null,
      "aria-sort": sorted ? (down ? "descending" : "ascending") : null,
    },
    make(
      "button",
      { type: "button", "data-focus": `sort:${key}`, onclick: () => choose({ sort: next }) },
      t(key),
      arrow,
    ),
  );
}

function sortedRows() {
  const rows = shownRuns().flatMap((run) => run.folders.map((folder) => ({ run, folder })));
  const key = state.sort.replace("-", "");
  const read =
    { folder: (row) => row.folder.name, run: (row) => row.run.name }[key] ??
    ((column) => column && ((row) => column[1](row.folder)))(COLUMNS.find(([name]) => name === key));
  if (!read) return rows;
  const sign = state.sort.startsWith("-") ? -1 : 1;
  return rows.sort((left, right) => sign * compared(read(left), read(right), sign));
}

// Missing values last, whichever the direction.
function compared(left, right, sign) {
  if (left === right) return 0;
  if (left === null || left === undefined) return sign;
  if (right === null || right === undefined) return -sign;
  return typeof left === "string" ? left.localeCompare(right) : left - right;
}

function folderRow({ run, folder }) {
  const row = make(
    "tr",
    {
      "data-name": folder.name,
      onclick: (event) => {
        if (!event.target.closest("button")) isolate(folder.name, event);
      },
    },
    make("th", { scope: "row" }, folderButton(folder.name, `row:${run.id}`, run)),
    manyRuns() ? make("td", { class: "text" }, shortName(run)) : null,
    ...COLUMNS.map(([key, read, format]) =>
      make("td", { class: key === "change" ? trend(folder.change) : null }, format(read(folder) ?? null)),
    ),
  );
  if (state.only.includes(folder.name)) row.classList.add("chosen");
  return row;
}

function trend(change) {
  return !isNumber(change) || change === 0 ? null : change < 0 ? "better" : "worse";
}
