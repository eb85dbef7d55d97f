// Generated texts: one prompt, two steps side by side.

function drawSamples() {
  const key = contentKey(["samples"], state.prompt, state.left, state.right);
  fill(sectionBody("samples"), key, () => {
    const all = shownRuns().flatMap((run) => run.samples.map((sample) => ({ ...sample, run })));
    return all.length ? samplePanel(all) : make("p", { class: "empty" }, t("no_samples"));
  });
}

// Steps are chosen as "step" or, over several runs, "run step"; the first and last one unless the reader chose.
function samplePanel(all) {
  const prompts = [...new Set(all.map((sample) => sample.prompt))];
  const prompt = prompts[Number(state.prompt)] ?? prompts[0];
  const samples = all.filter((sample) => sample.prompt === prompt).sort((a, b) => a.step - b.step);
  const names = samples.map(sampleName);
  const at = { left: chosenIndex(names, state.left, 0), right: chosenIndex(names, state.right, names.length - 1) };
  const panel = make(
    "div",
    { class: "samples" },
    promptChoice(prompts, prompt),
    make("div", { class: "pair" }, ...["left", "right"].map((side) => samplePane(side, samples, names, at))),
    make("p", { class: "hint" }, t("hint_samples")),
  );
  panel.addEventListener("keydown", (event) => sampleKey(event, names, at));
  return panel;
}

function sampleName(sample) {
  return manyRuns() ? `${shortName(sample.run)} ${sample.step}` : String(sample.step);
}

function chosenIndex(names, wanted, otherwise) {
  const index = names.indexOf(wanted);
  return index < 0 ? otherwise : index;
}

function promptChoice(prompts, prompt) {
  return make(
    "div",
    { class: "line" },
    make(
      "label",
      {},
      `${t("prompt")} `,
      select(
        "prompt",
        prompts.map((text, index) => [String(index), shortened(text)]),
        String(prompts.indexOf(prompt)),
        (value) => choose({ prompt: value }),
      ),
    ),
  );
}

function shortened(text) {
  return text.length > 80 ? `${text.slice(0, 79)}…` : text;
}

function select(name, options, chosen, onchoose) {
  const box = make(
    "select",
    { "data-focus": name },
    ...options.map(([value, label]) => make("option", { value }, label)),
  );
  box.value = chosen;
  box.addEventListener("change", () => onchoose(box.value));
  return box;
}

function samplePane(side, samples, names, at) {
  const sample = samples[at[side]];
  const step = (name, by, symbol) =>
    make(
      "button",
      {
        type: "button",
        "aria-label": `${t(name)}: ${t(`step_${side}`)}`,
        title: t(name),
        "data-focus": `${side}:${by}`,
        "aria-disabled": String(!names[at[side] + by]),
        onclick: () => moveSamples(names, { [side]: at[side] }, by),
      },
      symbol,
    );
  const box = select(
    side,
    names.map((name) => [name, `${t("step")} ${name}`]),
    names[at[side]],
    (value) => choose({ [side]: value }),
  );
  box.setAttribute("aria-label", t(`step_${side}`));
  return make(
    "div",
    { class: "pane" },
    make(
      "div",
      { class: "line" },
      step("previous", -1, "←"),
      box,
      step("next", 1, "→"),
      make("span", { class: "label" }, moment(sample.time)),
    ),
    make(
      "p",
      { class: "text", tabindex: "0", role: "region", "aria-label": `${t("step")} ${names[at[side]]}` },
      make("b", {}, sample.prompt),
      withoutPrompt(sample),
    ),
  );
}

// Some generators repeat the prompt before what they add.
function withoutPrompt(sample) {
  return sample.text.startsWith(sample.prompt) ? sample.text.slice(sample.prompt.length) : sample.text;
}

function moveSamples(names, sides, by) {
  const changes = Object.entries(sides)
    .filter(([, index]) => names[index + by])
    .map(([side, index]) => [side, names[index + by]]);
  if (changes.length) choose(Object.fromEntries(changes));
}

function sampleKey(event, names, at) {
  const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
  if (!by || event.target.tagName === "SELECT") return;
  event.preventDefault();
  moveSamples(names, at, by);
}
