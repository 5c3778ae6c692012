"use strict";
/* Where the page's data comes from: inside the file, files beside it, or the server that watches the run. */

report.store = (() => {
  const KEPT = 24; // chunks of transcripts, about a megabyte each
  const root = document.documentElement;
  const isLive = root.dataset.mode === "live";
  const chunks = new Map(); // name -> promise of its groups, the least recently used first
  const awaited = new Map(); // name -> what to call when its file delivers
  let version = 0;

  async function unpacked(base64) {
    const bytes = Uint8Array.from(atob(base64), (char) => char.charCodeAt(0));
    const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).text();
  }

  const embedded = (id) => unpacked(document.getElementById(id).textContent);

  /* The newest data, or null if the page has it already. */
  async function load() {
    if (!isLive) return JSON.parse(await embedded("data"));
    const answer = await fetch(`/data?have=${version}`);
    if (answer.status === 204) return null;
    const data = await answer.json();
    version = data.version;
    return data;
  }

  const loaded = () =>
    document.readyState === "loading"
      ? new Promise((done) => document.addEventListener("DOMContentLoaded", done, { once: true }))
      : Promise.resolve();

  /* Files beside a page cannot be fetched from file://, but run as scripts: each calls `deliver`. */
  function fromFolder(name) {
    return new Promise((done, failed) => {
      awaited.set(name, done);
      const script = document.createElement("script");
      script.src = `${root.dataset.folder}/${name.replace("/", "_")}.js`;
      script.onerror = () => failed(new Error(`${script.src} is missing: it belongs beside this page`));
      script.onload = () => script.remove();
      document.head.append(script);
    });
  }

  function deliver(name, base64) {
    awaited.get(name)(base64);
    awaited.delete(name);
  }

  async function fetched(name) {
    if (isLive) {
      const answer = await fetch(`/chunks/${name}`);
      if (!answer.ok) throw new Error("this transcript has changed meanwhile; choose it again");
      return answer.json();
    }
    if (root.dataset.folder) return JSON.parse(await unpacked(await fromFolder(name)));
    if (!document.getElementById(`chunk-${name}`)) await loaded();
    return JSON.parse(await embedded(`chunk-${name}`));
  }

  /* Groups of the chunk `name`, "run/chunk". */
  function chunk(name) {
    const found = chunks.get(name) || fetched(name);
    chunks.delete(name);
    chunks.set(name, found);
    found.catch(() => chunks.delete(name)); // tried again the next time
    if (chunks.size > KEPT) chunks.delete(chunks.keys().next().value);
    return found;
  }

  return { isLive, load, chunk, deliver, embedded };
})();
