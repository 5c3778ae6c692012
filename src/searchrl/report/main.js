"use strict";
/* Opens the data, switches between the parts, listens to the keyboard, and asks for news while watching. */

(() => {
  const { element, byId } = report.dom;
  const PARTS = ["curves", "tables", "trajectories"];
  const EVERY_MS = 2000;

  function select(part) {
    for (const name of PARTS) {
      byId(name).hidden = name !== part;
      byId(`tab-${name}`).setAttribute("aria-selected", String(name === part));
    }
    if (part === "curves") report.charts.show();
    window.history.replaceState(null, "", `#${part}`);
  }

  function toggleHelp() {
    const help = byId("help");
    help.hidden = !help.hidden;
    byId("help-button").setAttribute("aria-expanded", String(!help.hidden));
  }

  function describe(data) {
    const count = (number, one, many) => `${number.toLocaleString("en")} ${number === 1 ? one : many}`;
    const said = data.runs.map((run) => {
      const trained = count(run.steps.length, "step", "steps");
      const played = count(run.index.rows.group.length, "trajectory", "trajectories");
      return `${data.runs.length > 1 ? `${run.name}: ` : ""}${trained}, ${played}`;
    });
    const live = report.store.isLive ? [`live, as of ${new Date().toLocaleTimeString()}`] : [];
    byId("subtitle").textContent = [...said, ...live].join(" · ");
    const notes = data.runs.flatMap((run) => run.notes.map((note) => (data.runs.length > 1 ? `${run.name}: ${note}` : note)));
    byId("notes").replaceChildren(...notes.map((note) => element("li", null, note)));
  }

  function update(data) {
    describe(data);
    report.tables.update(data);
    report.browser.update(data);
    report.charts.update(data);
  }

  /* A server that has gone is no reason to lose what is shown. */
  async function watch() {
    const lost = Symbol("the server does not answer");
    const newest = await report.store.load().catch(() => lost);
    document.documentElement.dataset.connection = newest === lost ? "down" : "up";
    if (newest !== lost && newest !== null) update(newest);
    setTimeout(watch, EVERY_MS);
  }

  const inBrowser = {
    j: () => report.browser.move(1),
    k: () => report.browser.move(-1),
    ArrowDown: () => report.browser.move(1),
    ArrowUp: () => report.browser.move(-1),
    Home: () => report.browser.choose(0),
    End: () => report.browser.last(),
    ArrowRight: () => report.transcript.walk(1),
    ArrowLeft: () => report.transcript.walk(-1),
    g: () => report.browser.toggleGroup(),
    d: () => report.transcript.unfold(),
  };
  const anywhere = {
    1: () => select("curves"),
    2: () => select("tables"),
    3: () => select("trajectories"),
    "/": () => {
      select("trajectories");
      report.filters.focus();
    },
    "?": toggleHelp,
  };
  const STEPS = { ArrowLeft: -1, ArrowRight: 1 };
  const SCROLLING = new Set(["ArrowDown", "ArrowUp", "Home", "End"]);

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const isTyping = event.target.closest("input, select");
    if (event.key === "Escape") {
      if (isTyping) event.target.blur();
      byId("help").hidden = true;
    }
    if (isTyping) return;
    if (event.target.role === "tab" && STEPS[event.key]) {
      const next = PARTS.indexOf(event.target.id.slice(4)) + STEPS[event.key];
      const tab = byId(`tab-${PARTS[(next + PARTS.length) % PARTS.length]}`);
      tab.focus();
      tab.click();
      return;
    }
    // In the transcript these keys scroll it, as everywhere else in a browser.
    if (SCROLLING.has(event.key) && event.target.closest("#transcript")) return;
    const act = anywhere[event.key] || (byId("trajectories").hidden ? null : inBrowser[event.key]);
    if (!act) return;
    event.preventDefault();
    act();
  });
  for (const name of PARTS) byId(`tab-${name}`).addEventListener("click", () => select(name));
  byId("help-button").addEventListener("click", toggleHelp);

  report.charts.onClick((step) => {
    report.filters.only(step); // resetting the form lists anew
    select("trajectories");
  });

  const asked = window.location.hash.slice(1);
  select(PARTS.includes(asked) ? asked : "curves");
  const opening = report.store.isLive ? watch() : report.store.load().then(update);
  opening.then(() => {
    document.documentElement.dataset.ready = "yes";
  });
})();
