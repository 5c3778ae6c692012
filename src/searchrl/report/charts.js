"use strict";
/* The curves, by Plotly. Lines differ by colour (Okabe and Ito, safe for the colour-blind), dash and marker. */

report.charts = (() => {
  const { element, byId, shown } = report.dom;
  const COLOURS = ["#0072b2", "#e69f00", "#009e73", "#cc79a7", "#d55e00", "#56b4e9", "#8c8c8c", "#b8a800"];
  const DASHES = ["solid", "dash", "dot", "dashdot", "longdash", "longdashdot"];
  const SYMBOLS = ["circle", "square", "diamond", "triangle-up", "cross", "x", "star", "hexagon"];
  const PATTERNS = ["", "/", ".", "x", "\\", "+", "-", "|"];
  const MARKED = 80; // points up to which each has its marker
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  let data = null;
  let smoothing = 0;
  let plotly = null; // the promise of it
  let chosen = ""; // the metric that the reader asked for
  let isStale = true;
  let clicked = () => {}; // told the step of a point that is clicked
  let reader = null; // the panel in which any metric can be chosen

  function library() {
    plotly ||= report.store.embedded("plotly").then((text) => {
      document.head.append(element("script", null, text));
      return window.Plotly;
    });
    return plotly;
  }

  /* Exponential moving average, corrected for its start; gaps stay gaps. */
  function smoothed(values) {
    let sum = 0;
    let weight = 0;
    return values.map((value) => {
      if (value === null) return null;
      sum = smoothing * sum + (1 - smoothing) * value;
      weight = smoothing * weight + (1 - smoothing);
      return sum / weight;
    });
  }

  /* A curve; of several runs, or of several in a run, the one with this number. */
  function line(run, values, name, number) {
    const base = { x: run.steps, name, connectgaps: true, legendgroup: name };
    const isShort = run.steps.length <= MARKED;
    const drawn = {
      ...base,
      y: smoothing ? smoothed(values) : values,
      mode: isShort ? "lines+markers" : "lines",
      line: { color: COLOURS[number % COLOURS.length], dash: DASHES[number % DASHES.length], width: 2 },
      marker: { symbol: SYMBOLS[number % SYMBOLS.length], size: 5 },
    };
    if (!smoothing) return [drawn];
    const raw = { ...base, y: values, mode: "lines", opacity: 0.25, hoverinfo: "skip", showlegend: false };
    return [{ ...raw, line: { color: drawn.line.color, width: 1 } }, drawn];
  }

  function stacked(run, values, name, at, kind) {
    const colour = COLOURS[at % COLOURS.length];
    const shape = PATTERNS[at % PATTERNS.length];
    const pattern = { shape, bgcolor: colour, fgcolor: "rgba(255,255,255,0.6)", size: 6, solidity: 0.25 };
    const base = { x: run.steps, y: values, name };
    if (kind === "bar") return { ...base, type: "bar", marker: { color: colour, pattern } };
    return { ...base, mode: "lines", stackgroup: "all", line: { width: 0.5, color: colour }, fillcolor: colour, fillpattern: pattern };
  }

  /* Evaluations: markers with their intervals, larger and hollow, so that they stand out from the curves. */
  function evaluations(panel, run, number) {
    if (!run.evaluations.length) return [];
    const isOne = data.runs.length === 1;
    const parts = isOne ? run.evaluations[0].parts.map((part) => part.name) : ["all"];
    return parts.map((name, at) => {
      const points = run.evaluations
        .map((evaluation) => [evaluation.step, evaluation.parts.find((part) => part.name === name)])
        .filter(([, part]) => part)
        .map(([step, part]) => ({ step, ...part[panel.evaluation] }));
      const like = isOne ? at : number; // the curve that it belongs to
      const colour = COLOURS[like % COLOURS.length];
      return {
        x: points.map((point) => point.step),
        y: points.map((point) => point.value),
        error_y: {
          array: points.map((point) => point.high - point.value),
          arrayminus: points.map((point) => point.value - point.low),
          visible: points.some((point) => point.high > point.low),
          symmetric: false,
          thickness: 1.5,
          width: 4,
        },
        name: isOne ? (name === "all" ? "evaluation" : `evaluation, ${name}`) : `${run.name}, evaluation`,
        mode: points.length > 1 ? "lines+markers" : "markers",
        line: { color: colour, width: 1, dash: "dot" },
        marker: { symbol: `${SYMBOLS[like % SYMBOLS.length]}-open`, size: 11, line: { width: 2 } },
      };
    });
  }

  function traces(panel) {
    const isOne = data.runs.length === 1;
    return data.runs.flatMap((run, number) => {
      const drawn = panel.series.flatMap(({ metric, label }, at) => {
        const values = run.metrics[metric];
        if (!values) return [];
        if (panel.kind !== "line") return [stacked(run, values, label, at, panel.kind)];
        return line(run, values, isOne ? label : run.name, isOne ? at : number);
      });
      return panel.evaluation ? [...drawn, ...evaluations(panel, run, number)] : drawn;
    });
  }

  function layout(panel, count) {
    const ink = dark.matches ? "#d6d9de" : "#33383f";
    const grid = dark.matches ? "#3a3f47" : "#e4e7eb";
    const last = Math.max(0, ...data.runs.map((run) => run.steps.at(-1) ?? 0)); // few steps: no fractions of one
    const axis = { gridcolor: grid, zerolinecolor: grid, linecolor: grid, automargin: true };
    return {
      height: 270,
      margin: { l: 46, r: 12, t: 8, b: 30 },
      paper_bgcolor: "rgba(0,0,0,0)",
      plot_bgcolor: "rgba(0,0,0,0)",
      font: { family: "system-ui, sans-serif", size: 12, color: ink },
      xaxis: { ...axis, ...(last < 10 && { dtick: 1 }), title: { text: "step", standoff: 2, font: { size: 11 } } },
      yaxis: { ...axis, type: panel.log ? "log" : "linear", exponentformat: "power", rangemode: "tozero" },
      uirevision: "kept", // new data leaves the zoom and hidden curves as they are
      hovermode: "x unified",
      hoverlabel: { bgcolor: dark.matches ? "#22262c" : "#ffffff", bordercolor: grid, font: { color: ink } },
      barmode: "stack",
      bargap: 0.15,
      showlegend: count > 1,
      legend: { orientation: "h", y: -0.2, x: 0, yanchor: "top", font: { size: 11 } },
    };
  }

  const SETTINGS = {
    displaylogo: false,
    responsive: true,
    modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d", "zoomIn2d", "zoomOut2d"],
  };

  /* What the chart says, for who does not see it. */
  function described(panel) {
    const said = data.runs.flatMap((run) =>
      panel.series.slice(0, 3).flatMap(({ metric, label }) => {
        const values = (run.metrics[metric] || []).filter((value) => value !== null);
        const from = values.length ? `${label} from ${shown(values[0])} to ${shown(values.at(-1))}` : "";
        return from ? [data.runs.length > 1 ? `${run.name}: ${from}` : from] : [];
      }),
    );
    return `${panel.title}, ${panel.note}. ${said.join("; ")}`;
  }

  async function draw(panel, figure) {
    const drawn = traces(panel);
    const canvas = figure.querySelector(".canvas");
    figure.hidden = !drawn.length && panel !== reader;
    canvas.setAttribute("aria-label", described(panel));
    const Plotly = await library();
    const isFirst = !canvas.data;
    if (drawn.length) await Plotly.react(canvas, drawn, layout(panel, drawn.filter((t) => t.showlegend !== false).length), SETTINGS);
    else if (canvas.data) Plotly.purge(canvas);
    if (drawn.length && isFirst) canvas.on("plotly_click", ({ points }) => clicked(points[0].x));
  }

  function frame(panel, ...extra) {
    const caption = element("figcaption", null, element("h2", null, panel.title), element("p", null, panel.note), ...extra);
    return element("figure", null, caption, element("div", { class: "canvas", role: "img" }));
  }

  /* Charts are kept and redrawn: a reader's zoom and hidden curves survive new data. */
  const figures = new Map();

  function place(panel, ...extra) {
    if (!figures.has(panel.title)) {
      figures.set(panel.title, frame(panel, ...extra));
      byId("charts").append(figures.get(panel.title));
    }
    return figures.get(panel.title);
  }

  function metricChooser() {
    const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.metrics)))].sort();
    const options = names.map((name) => element("option", { value: name, selected: name === chosen }, name));
    const choose = (event) => {
      chosen = event.target.value;
      redraw();
    };
    return element("select", { "aria-label": "Metric", id: "metric", change: choose }, element("option", { value: "" }, "choose…"), options);
  }

  async function redraw() {
    isStale = false;
    for (const panel of data.panels) await draw(panel, place(panel));
    reader = { title: "Any metric", note: "of metrics.jsonl", kind: "line", log: false, evaluation: "", series: [] };
    if (chosen) reader.series = [{ metric: chosen, label: chosen }];
    if (data.runs.some((run) => run.steps.length)) {
      const figure = place(reader);
      byId("charts").append(figure); // stays the last
      const chooser = metricChooser();
      if (byId("metric")?.length !== chooser.length) {
        byId("metric")?.remove();
        figure.querySelector("figcaption").append(chooser);
      }
      await draw(reader, figure);
    }
    document.documentElement.dataset.charts = "drawn";
  }

  /* New data; drawn when it is looked at, because a hidden chart has no size. */
  function update(newest) {
    data = newest;
    isStale = true;
    if (!byId("curves").hidden) redraw();
  }

  function show() {
    if (data && isStale) redraw();
  }

  byId("smoothing").addEventListener("input", (event) => {
    smoothing = Number(event.target.value);
    byId("smoothing-value").textContent = smoothing ? smoothing.toFixed(2) : "off";
    redraw();
  });
  dark.addEventListener("change", () => data && redraw());

  const onClick = (told) => {
    clicked = told;
  };

  return { update, show, onClick };
})();
