"use strict";
/* Elements of the page. Text from a run reaches it through here alone, as text nodes and attribute values:
   nothing in this report makes markup out of data. */

const report = {};

report.dom = (() => {
  /* An element with attributes (false and null: none; a function: listener of that event) and children. */
  function element(tag, attributes, ...children) {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (typeof value === "function") made.addEventListener(name, value);
      else if (value !== false && value !== null) made.setAttribute(name, value === true ? "" : value);
    }
    made.append(...children.flat().filter((child) => child !== null && child !== ""));
    return made;
  }

  const byId = (id) => document.getElementById(id);

  /* 0.1234 and 12,345 rather than 0.12339999 and 12345.2. */
  function shown(value, digits = 4) {
    if (value === null || value === undefined) return "–";
    if (value !== 0 && (Math.abs(value) < 1e-3 || Math.abs(value) >= 1e7)) return value.toExponential(2);
    return value.toLocaleString("en", { maximumSignificantDigits: Math.abs(value) >= 1000 ? 6 : digits });
  }

  return { element, byId, shown };
})();
