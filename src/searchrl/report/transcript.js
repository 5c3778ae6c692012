"use strict";
/* One trajectory, or its whole group side by side: every token by who produced it, with its numbers. */

report.transcript = (() => {
  const { element, byId, shown } = report.dom;
  const pane = byId("transcript");
  const tip = byId("tip");
  const turns = new WeakMap(); // element of a turn's tokens -> the turn
  let shade = "";

  /* Blank tokens must be seen: a space, a line break. */
  const visible = (text) => text.replaceAll("\n", "↵\n").replaceAll("\t", "⇥");
  const named = (text) => (text === "" ? "part of a character" : JSON.stringify(text));

  function badge(text, kind, title) {
    return element("span", { class: `badge ${kind || ""}`, title: title || null }, text);
  }

  function ratio(turn, at) {
    const trainer = turn.trainer?.[at];
    const engine = turn.logprobs[at];
    return trainer === undefined || trainer === null || engine === null ? null : Math.exp(trainer - engine);
  }

  /* How strongly a token is shaded, 0 to 1: 5 nats of surprise, or a ratio off by half, is all of it. */
  function strength(turn, at) {
    const logprob = turn.logprobs[at];
    if (shade === "surprise") return logprob === null ? 0 : Math.min(1, -logprob / 5);
    const value = shade === "ratio" ? ratio(turn, at) : null;
    return value === null ? 0 : Math.min(1, Math.abs(Math.log(value)) / Math.log(1.5));
  }

  function tokens(turn) {
    if (!turn.tokens) return element("div", { class: "sampled whole" }, turn.text);
    const spans = turn.tokens.map((text, at) => {
      const span = element("span", { class: "token", "data-at": String(at) }, visible(text));
      if (shade) span.style.setProperty("--strength", strength(turn, at).toFixed(3));
      return span;
    });
    const made = element("div", { class: "sampled" }, spans);
    turns.set(made, turn);
    return made;
  }

  /* The block of documents, each folded: a line of the text begins each. */
  function observation(turn) {
    const pieces = turn.appended.split(/^(?=Doc \d+\(Title: )/m);
    const isSplit = turn.documents.length > 0 && pieces.length === turn.documents.length + 1;
    if (!isSplit) {
      const summary = element("summary", null, turn.documents.length ? "documents" : "text");
      return [element("details", null, summary, element("div", { class: "text" }, turn.appended.trim()))];
    }
    return turn.documents.map((document, at) =>
      element("details", null,
        element("summary", null, `${at + 1}  ${document.title || document.id}`,
          element("small", null, ` id ${document.id}, score ${shown(document.score)}`)),
        element("div", { class: "text" }, pieces[at + 1].trim()),
      ),
    );
  }

  function appended(turn) {
    if (!turn.appended_by) return null;
    const isObserved = turn.appended_by === "observation";
    const count = turn.documents.length;
    const found = turn.search === "empty" ? "nothing found" : `${count} ${count === 1 ? "document" : "documents"}`;
    const took = turn.seconds === null ? "" : `, ${Math.round(turn.seconds * 1000)} ms`;
    const about = isObserved ? `${found}${took}, ` : "";
    return element("section", { class: `block ${turn.appended_by}` },
      element("h4", null, turn.appended_by, element("small", null, `${about}${turn.appended_tokens} tokens, no loss`)),
      isObserved ? observation(turn) : element("div", { class: "text" }, turn.appended.trim()));
  }

  function turnParts(turn, number) {
    const mean = turn.logprobs.length ? turn.logprobs.reduce((sum, value) => sum + (value || 0), 0) / turn.logprobs.length : null;
    const about = `turn ${number + 1}, ${turn.logprobs.length} tokens, mean log-prob ${shown(mean, 3)}, ended by ${turn.finish}, policy ${turn.version ?? "–"}`;
    const sampled = element("section", { class: "block own" }, element("h4", null, "sampled", element("small", null, about)), tokens(turn));
    return [sampled, appended(turn)];
  }

  function prompt(group) {
    if (!group.prompt) return null;
    const { text, tokens: length } = group.prompt;
    return element("details", { class: "block prompt" },
      element("summary", null, element("h4", null, "prompt"), element("small", null, ` ${length} tokens, no loss`)),
      element("div", { class: "text" }, text ?? "The file holds its length only: the run is older, or its tokenizer is not here."));
  }

  function verdict(row) {
    if (row.exact === null) return badge("void", "void", "A search failed, or the episode was ended: not scored");
    return row.exact ? badge("✓ right", "right") : badge("✗ wrong", "wrong");
  }

  function scores(row, member) {
    const parts = Object.entries(member.components).map(([name, value]) => `${name.replaceAll("_", " ")} ${shown(value)}`);
    const flags = { valid_format: "valid format", retrieval_hit: "gold shown", evidence: "all evidence", judged: "judged right" };
    return element("p", { class: "scores" },
      verdict(row), badge(row.outcomeName, "plain"),
      row.reward === null ? null : badge(`reward ${shown(row.reward)}`, "plain", parts.join(", ")),
      parts.length > 1 ? element("small", null, `= ${parts.join(" + ")}`) : null,
      Object.entries(flags).filter(([name]) => member.flags[name] !== null && member.flags[name] !== undefined)
        .map(([name, text]) => badge(`${member.flags[name] ? "✓" : "✗"} ${text}`, "faint")));
  }

  /* The body of one member: scores, answer, turns. */
  function memberParts(group, row) {
    const member = group.members[row.place];
    return [
      scores(row, member),
      member.error ? element("p", { class: "error" }, member.error) : null,
      element("p", { class: "answer" }, "answer ", row.answer === null ? element("em", null, "none") : element("strong", null, row.answer)),
      ...member.turns.flatMap(turnParts),
    ];
  }

  function legend(hasTokens, hasRatio, redraw) {
    const choices = [["", "provenance only"], ["surprise", "−log-prob"], ["ratio", "ratio"]];
    const options = choices.filter(([name]) => name !== "ratio" || hasRatio)
      .map(([value, text]) => element("option", { value, selected: value === shade }, text));
    const change = (event) => {
      shade = event.target.value;
      redraw();
    };
    return element("p", { class: "legend", "aria-label": "Legend" },
      ["prompt", "sampled", "observation", "inserted"].map((name) => element("span", { class: `key ${name}` }, name)),
      hasTokens ? element("label", null, "shade ", element("select", { change, "aria-label": "Shade tokens by" }, options)) : null);
  }

  /* Show `rows` of the group: one, or all side by side.
     rows: [{place, exact, reward, answer, outcomeName, member, isChosen, choose}] */
  function show(about, group, rows, toggleGroup) {
    const redraw = () => show(about, group, rows, toggleGroup);
    const all = group.members.flatMap((member) => member.turns);
    if (shade === "ratio" && !all.some((turn) => turn.trainer)) shade = "";
    const several = rows.length > 1;
    const bodies = several
      ? element("div", { class: "columns" }, rows.map((row) =>
        element("section", { class: `member ${row.isChosen ? "chosen" : ""}`, "aria-current": row.isChosen ? "true" : null },
          element("h3", null, element("button", { click: row.choose, title: "Show this one alone" }, `#${row.member}`)),
          memberParts(group, row))))
      : memberParts(group, rows[0]);
    pane.classList.toggle("shaded", shade !== "");
    pane.replaceChildren(
      element("header", null,
        element("h2", null, about.question),
        element("p", { class: "gold" }, "gold ", about.gold.map((gold) => element("code", null, gold))),
        element("p", { class: "where" }, about.where, " ",
          group.members.length > 1
            ? element("button", { click: toggleGroup, "aria-pressed": String(several) }, several ? "this one alone (g)" : `the group of ${group.members.length} side by side (g)`)
            : null),
        legend(all.some((turn) => turn.tokens), all.some((turn) => turn.trainer), redraw)),
      ...[prompt(group), bodies].flat().filter(Boolean));
    pane.scrollTop = 0;
    hideTip();
  }

  function say(text) {
    pane.replaceChildren(element("p", { class: "empty" }, text));
    hideTip();
  }

  function numbers(turn, at) {
    const logprob = turn.logprobs[at];
    const probability = logprob === null ? null : Math.exp(logprob);
    const off = ratio(turn, at);
    return [
      ["token", named(turn.tokens[at])],
      ["engine log-prob", `${shown(logprob)}  (p ${shown(probability, 3)})`],
      ["trainer log-prob", off === null ? "not in the update" : shown(turn.trainer[at])],
      ["ratio", off === null ? "–" : off.toFixed(4)],
    ];
  }

  function showTip(span) {
    const turn = turns.get(span.parentElement);
    const lines = numbers(turn, Number(span.dataset.at));
    hideTip();
    span.classList.add("current");
    tip.replaceChildren(element("dl", null, lines.flatMap(([name, value]) => [element("dt", null, name), element("dd", null, value)])));
    tip.hidden = false;
    const box = span.getBoundingClientRect();
    tip.style.left = `${Math.max(4, Math.min(box.left, window.innerWidth - tip.offsetWidth - 8))}px`;
    const below = box.bottom + 6;
    tip.style.top = `${below + tip.offsetHeight > window.innerHeight ? box.top - tip.offsetHeight - 6 : below}px`;
    return lines;
  }

  function hideTip() {
    tip.hidden = true;
    pane.querySelector(".token.current")?.classList.remove("current");
  }

  /* The next or previous token, with its numbers; also said aloud. */
  function walk(by) {
    const all = [...pane.querySelectorAll(".token")];
    if (!all.length) return;
    const at = all.findIndex((span) => span.classList.contains("current"));
    const span = all[Math.max(0, Math.min(all.length - 1, at < 0 ? 0 : at + by))];
    span.scrollIntoView({ block: "nearest" });
    byId("spoken").textContent = showTip(span).map((pair) => pair.join(" ")).join(", ");
  }

  function unfold() {
    const all = [...pane.querySelectorAll(".observation details")];
    const isOpen = all.some((details) => !details.open);
    for (const details of all) details.open = isOpen;
  }

  pane.addEventListener("mouseover", (event) => {
    const span = event.target.closest(".token");
    if (span) showTip(span);
    else hideTip();
  });
  pane.addEventListener("mouseleave", hideTip);
  pane.addEventListener("scroll", hideTip);

  return { show, say, walk, unfold };
})();
