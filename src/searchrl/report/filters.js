"use strict";
/* What is listed, and in which order. The form's fields are the state: new data leaves them as they are. */

report.filters = (() => {
  const { element, byId } = report.dom;
  const form = byId("filters");
  const haystacks = new WeakMap(); // index -> what is searched in each row, lower case
  const ORDERS = [
    ["order", "order of the run"],
    ["-step", "newest first"],
    ["-reward", "highest reward"],
    ["reward", "lowest reward"],
    ["-searches", "most searches"],
    ["-sampled", "longest"],
  ];
  let field = {};

  const option = ([value, text]) => element("option", { value }, text);

  function select(name, label, options) {
    field[name] = element("select", { name }, options.map(option));
    return element("label", null, label, field[name]);
  }

  function range(name, label, step) {
    field[`${name}From`] = element("input", { type: "number", step, "aria-label": `${label}, from`, placeholder: "from" });
    field[`${name}To`] = element("input", { type: "number", step, "aria-label": `${label}, to`, placeholder: "to" });
    return element("span", { class: "range" }, label, field[`${name}From`], "–", field[`${name}To`]);
  }

  function build(changed) {
    field.text = element("input", {
      type: "search", name: "text", placeholder: "question, answer or query  ( / )", "aria-label": "Search",
    });
    form.append(
      field.text,
      select("run", "run", []),
      select("set", "from", [["", "all"], ["0", "training"], ["1", "evaluation"]]),
      select("outcome", "outcome", []),
      select("exact", "exact match", [["", "all"], ["1", "right"], ["0", "wrong"], ["void", "void"]]),
      select("hops", "hops", []),
      range("reward", "reward", "any"),
      range("step", "step", "1"),
      select("sort", "sort", ORDERS),
      element("button", { type: "reset" }, "clear"),
      element("output", { id: "count", "aria-live": "polite" }),
    );
    form.addEventListener("submit", (event) => event.preventDefault());
    form.addEventListener("input", () => changed());
    form.addEventListener("reset", () => setTimeout(changed)); // after the fields are empty
  }

  /* Choices that the data decides; what is chosen stays. */
  function offer(name, options) {
    const { value } = field[name];
    field[name].replaceChildren(...options.map(option));
    field[name].value = options.some(([known]) => known === value) ? value : options[0][0];
  }

  function update(data) {
    offer("run", data.runs.map((run, number) => [String(number), run.name]));
    field.run.parentElement.hidden = data.runs.length === 1;
    const { groups } = data.runs[run()].index;
    const hops = [...new Set(groups.hops)].sort((a, b) => a - b);
    offer("hops", [["", "all"], ...hops.map((number) => [String(number), number ? String(number) : "not said"])]);
    field.hops.parentElement.hidden = hops.length < 2;
    offer("outcome", [["", "all"], ...data.outcomes.map((name, code) => [String(code), name.replaceAll("_", " ")])]);
  }

  const run = () => Number(field.run.value);

  function haystack(index) {
    if (!haystacks.has(index)) {
      const { groups, rows } = index;
      const ofGroup = groups.question.map((question, at) =>
        [question, groups.question_id[at], ...groups.gold[at]].join("\n").toLowerCase(),
      );
      haystacks.set(index, rows.group.map((group, row) =>
        `${ofGroup[group]}\n${(rows.answer[row] || "").toLowerCase()}\n${rows.queries[row].toLowerCase()}`,
      ));
    }
    return haystacks.get(index);
  }

  /* Tests of single rows, for the fields that are set. */
  function tests({ groups, rows }) {
    const found = [];
    const number = (name) => (field[name].value === "" ? null : Number(field[name].value));
    const between = (from, to, value) => {
      if (from !== null) found.push((row) => value(row) !== null && value(row) >= from);
      if (to !== null) found.push((row) => value(row) !== null && value(row) <= to);
    };
    const equal = (name, value) => {
      const wanted = number(name);
      if (wanted !== null) found.push((row) => value(row) === wanted);
    };
    equal("set", (row) => groups.evaluation[rows.group[row]]);
    equal("outcome", (row) => rows.outcome[row]);
    equal("hops", (row) => groups.hops[rows.group[row]]);
    if (field.exact.value === "void") found.push((row) => rows.exact[row] === null);
    else if (field.exact.value) equal("exact", (row) => rows.exact[row]);
    between(number("rewardFrom"), number("rewardTo"), (row) => rows.reward[row]);
    between(number("stepFrom"), number("stepTo"), (row) => groups.step[rows.group[row]]);
    return found;
  }

  function sorted(kept, { groups, rows }) {
    const by = field.sort.value.replace("-", "");
    if (by === "order") return kept;
    const sign = field.sort.value.startsWith("-") ? -1 : 1;
    const value = by === "step" ? (row) => groups.step[rows.group[row]] : (row) => rows[by][row];
    const rank = (row) => (value(row) === null ? Infinity : sign * value(row)); // void ones last, always
    return kept.sort((a, b) => rank(a) - rank(b) || a - b);
  }

  /* Rows of the index that are to be listed, in order. */
  function apply(index) {
    const checks = tests(index);
    const text = field.text.value.trim().toLowerCase();
    const searched = text ? haystack(index) : null;
    const kept = [];
    for (let row = 0; row < index.rows.group.length; row += 1) {
      if (checks.every((check) => check(row)) && (!text || searched[row].includes(text))) kept.push(row);
    }
    return sorted(kept, index);
  }

  /* The trajectories of one step, whatever was asked for before. */
  function only(step) {
    form.reset();
    field.stepFrom.value = step;
    field.stepTo.value = step;
  }

  const focus = () => field.text.focus();

  return { build, update, apply, run, only, focus };
})();
