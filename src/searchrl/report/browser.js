"use strict";
/* The list of trajectories, of which only the rows in sight exist, and what is chosen in it. */

report.browser = (() => {
  const { element, byId, shown } = report.dom;
  const HEIGHT = 54; // of a row, in pixels; as in page.css
  const list = byId("list");
  const rows = byId("rows");
  let data = null;
  let listed = []; // rows of the index
  let chosen = null; // what identifies the trajectory: it outlives new data
  let position = -1; // in `listed`
  let isGroup = false;
  let shownTurn = 0; // counts what was asked for: the answer to an older wish is dropped

  const current = () => data.runs[report.filters.run()];

  function key(row) {
    const { groups, rows: columns } = current().index;
    const group = columns.group[row];
    return [report.filters.run(), groups.evaluation[group], groups.step[group], groups.id[group], columns.member[row]].join("|");
  }

  function item(at) {
    const { groups, rows: columns } = current().index;
    const row = listed[at];
    const group = columns.group[row];
    const exact = columns.exact[row];
    const mark = exact === null ? "○" : exact ? "✓" : "✗";
    const said = exact === null ? "void" : exact ? "right" : "wrong";
    const reward = columns.reward[row];
    const outcome = data.outcomes[columns.outcome[row]].replaceAll("_", " ");
    const answer = columns.answer[row];
    const where = `${groups.evaluation[group] ? "eval" : "step"} ${groups.step[group]}, ${groups.id[group]}/${columns.member[row]}`;
    return element("div", {
      role: "option", class: `row ${said}`, id: `row-${at}`, "aria-selected": String(at === position),
      "aria-posinset": String(at + 1), "aria-setsize": String(listed.length), style: null,
      click: () => choose(at),
    },
    element("span", { class: "mark", "aria-label": said }, mark),
    element("span", { class: "question" }, groups.question[group]),
    element("span", { class: "about" }, where),
    element("span", { class: "answer" }, answer === null ? outcome : answer),
    element("span", { class: "reward" }, reward === null ? "" : shown(reward, 3)));
  }

  /* Rows in sight, and a few around them. */
  function paint() {
    rows.style.height = `${listed.length * HEIGHT}px`;
    const first = Math.max(0, Math.floor(list.scrollTop / HEIGHT) - 4);
    const last = Math.min(listed.length, first + Math.ceil(list.clientHeight / HEIGHT) + 8);
    const made = [];
    for (let at = first; at < last; at += 1) {
      const row = item(at);
      row.style.top = `${at * HEIGHT}px`;
      made.push(row);
    }
    rows.replaceChildren(...made);
    if (position >= 0) list.setAttribute("aria-activedescendant", `row-${position}`);
    else list.removeAttribute("aria-activedescendant");
  }

  function reveal(at) {
    const top = at * HEIGHT;
    if (top < list.scrollTop) list.scrollTop = top;
    else if (top + HEIGHT > list.scrollTop + list.clientHeight) list.scrollTop = top + HEIGHT - list.clientHeight;
  }

  function choose(at) {
    if (!listed.length) return;
    position = Math.max(0, Math.min(listed.length - 1, at));
    chosen = key(listed[position]);
    reveal(position);
    paint();
    open();
  }

  /* The members of a group, as `transcript.show` takes them. */
  function members(group, wanted) {
    const { rows: columns } = current().index;
    const found = [];
    for (let row = columns.group.indexOf(group); columns.group[row] === group; row += 1) found.push(row);
    return found.map((row, place) => ({
      place,
      row,
      member: columns.member[row],
      exact: columns.exact[row],
      reward: columns.reward[row],
      answer: columns.answer[row],
      outcomeName: data.outcomes[columns.outcome[row]].replaceAll("_", " "),
      isChosen: row === wanted,
      choose: () => alone(row),
    }));
  }

  /* A member that the filters leave out is shown all the same: the list's choice stays where it is. */
  function alone(row) {
    isGroup = false;
    const at = listed.indexOf(row);
    if (at >= 0) choose(at);
    else open(row);
  }

  async function open(row = listed[position]) {
    shownTurn += 1;
    const wish = shownTurn;
    const run = current();
    const { groups, rows: columns } = run.index;
    const group = columns.group[row];
    let transcripts;
    try {
      transcripts = await report.store.chunk(`${report.filters.run()}/${run.chunks[groups.chunk[group]]}`);
    } catch (error) {
      if (wish === shownTurn) report.transcript.say(`This transcript cannot be shown: ${error.message}`);
      return;
    }
    if (wish !== shownTurn) return;
    const all = members(group, row);
    const hops = groups.hops[group] ? `, ${groups.hops[group]} hop` : "";
    const where = `${groups.evaluation[group] ? "evaluation after" : ""} step ${groups.step[group]}, group ${groups.id[group]}, #${columns.member[row]}, ${groups.question_id[group]}${hops}`;
    const about = { question: groups.question[group], gold: groups.gold[group], where };
    report.transcript.show(about, transcripts[groups.place[group]], isGroup ? all : all.filter((one) => one.isChosen), toggleGroup);
  }

  function toggleGroup() {
    if (position < 0) return;
    isGroup = !isGroup;
    open();
  }

  /* List anew. What is chosen stays chosen, and in its place, if it is still listed. */
  function refresh({ isNewData = false } = {}) {
    const { index } = current();
    listed = report.filters.apply(index);
    position = chosen === null ? -1 : listed.findIndex((row) => key(row) === chosen);
    const total = index.rows.group.length;
    byId("count").textContent = `${listed.length.toLocaleString("en")} of ${total.toLocaleString("en")}`;
    if (!isNewData) {
      list.scrollTop = 0;
      if (position >= 0) reveal(position);
    }
    paint();
    if (!listed.length) report.transcript.say(total ? "Nothing matches the filters." : "No trajectories yet.");
    else if (position < 0 && !isNewData) choose(0);
    else if (chosen === null) choose(0);
  }

  function update(newest) {
    const isFirst = data === null;
    data = newest;
    report.filters.update(data);
    refresh({ isNewData: !isFirst });
  }

  const move = (by) => choose(position + by);
  const last = () => choose(listed.length - 1);

  list.addEventListener("scroll", paint);
  new ResizeObserver(paint).observe(list);
  report.filters.build(() => {
    if (!data) return;
    report.filters.update(data); // another run has other hops
    refresh();
  });

  return { update, move, choose, last, toggleGroup };
})();
