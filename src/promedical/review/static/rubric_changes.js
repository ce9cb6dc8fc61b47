/* How the changes of a rubric read: a sentence word by word, an edited rubric line by line, a field and
 * its value by their names. Texts of others are set as text. Needs `stores.js` and `draft.js`.
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const D = Review.draft;

  const words = (name, values) => Review.words(name, values);
  const percent = (weight) => Math.round(weight * 1000) / 10;
  const make = (name, className, text) => {
    const made = document.createElement(name);
    if (className) made.className = className;
    if (text !== undefined) made.textContent = text;
    return made;
  };
  Object.assign(Review, { percent, make });

  /* ---- what changed in a sentence, word by word ---- */

  const tokens = (text) => text.match(/[\u3400-\u9fff]|[^\s\u3400-\u9fff]+|\s+/g) || [];

  /* [[" ", "same"], ["-", "old"], ["+", "new"], …] by the longest common subsequence of words. */
  Review.wordChanges = (before, after) => {
    const [a, b] = [tokens(before), tokens(after)];
    if (a.length * b.length > 250000) return [["-", before], ["+", after]];
    const long = Array.from({ length: a.length + 1 }, () => new Uint16Array(b.length + 1));
    for (let i = a.length - 1; i >= 0; i--) {
      for (let j = b.length - 1; j >= 0; j--) {
        long[i][j] = a[i] === b[j] ? long[i + 1][j + 1] + 1 : Math.max(long[i + 1][j], long[i][j + 1]);
      }
    }
    const found = [];
    const put = (kind, text) => {
      if (found.length && found[found.length - 1][0] === kind) found[found.length - 1][1] += text;
      else found.push([kind, text]);
    };
    let [i, j] = [0, 0];
    while (i < a.length || j < b.length) {
      if (i < a.length && j < b.length && a[i] === b[j]) [i, j] = [i + 1, (put(" ", a[i]), j + 1)];
      else if (i < a.length && (j === b.length || long[i + 1][j] >= long[i][j + 1])) put("-", a[i++]);
      else put("+", b[j++]);
    }
    return found;
  };

  const showChanges = (Review.showChanges = (element, before, after) => {
    const names = { " ": "span", "-": "del", "+": "ins" };
    element.replaceChildren(
      ...Review.wordChanges(before, after).map(([kind, text]) => make(names[kind], "", text)),
    );
  });

  /* Where a sentence of two claims would be cut: at the cursor, else at a joint near its middle. */
  Review.cutText = (text, at = null) => {
    if (at === null || !text.slice(0, at).trim() || !text.slice(at).trim()) {
      // A full stop or comma inside a number is no joint.
      const joints = [...text.matchAll(/[.;]\s+(?=\S)|[。；]\s*(?=\S)|(?:,\s|，)\s*(?:(?:and|or)\s|以及|并)?\s*(?=\S)|\s(?:and|or)\s|以及|并且/g)];
      const far = (joint) => Math.abs(joint.index + joint[0].length / 2 - text.length / 2);
      joints.sort((one, other) => far(one) - far(other));
      if (!joints.length) return [text.trim(), ""];
      const joint = joints[0];
      const keeps = /^[.。]/.test(joint[0]) ? joint[0].trim() : "";
      return [text.slice(0, joint.index).trim() + keeps, text.slice(joint.index + joint[0].length).trim()];
    }
    return [text.slice(0, at).trim(), text.slice(at).trim()];
  };

  /* What an edited rubric changed, a list entry each. */
  Review.changeLines = (draft, criteria) => {
    const edits = D.counted(D.diff(draft, criteria));
    if (!edits.length) return [make("li", "", words("no_edits"))];
    const now = new Map(criteria.map((c) => [c.id, c]));
    const drafted = new Map(draft.map((c) => [c.id, c]));
    return edits.map((e) => {
      const line = make("li", "", `${words("edit_" + e.what)}: `);
      const change = make("span", "changes");
      const c = now.get(e.criterion) || drafted.get(e.criterion);
      if (e.what === "text") showChanges(change, e.from, e.to);
      else if (e.what === "removed") change.append(make("del", "", c.text));
      else if (e.to && e.to.text) change.append(make("ins", "", e.to.text));
      else if (e.what === "moved") change.textContent = c.text;
      else change.textContent = `${Review.fieldValue([e.what], e.from)} → ${Review.fieldValue([e.what], e.to)} · ${c.text}`;
      line.append(change);
      return line;
    });
  };

  /* ---- a field and its value ---- */

  /* A field's name, from its path in the answer, for the choice between two versions. */
  Review.fieldLabel = (path, mine, theirs) => {
    if (path[0] !== "criteria") return words("field_" + path[0]);
    if (path[1] === "order") return words("field_order");
    const c = [...mine.criteria, ...theirs.criteria].find((one) => one.id === path[1]);
    const text = c ? c.text.slice(0, 60) + (c.text.length > 60 ? " …" : "") : "";
    return path.length === 2 ? words("field_criterion") : `${words("field_" + path[2])}: ${text}`;
  };

  /* Its value; `known` are criteria whose texts stand for their ids. */
  Review.fieldValue = (path, value, known = []) => {
    const name = path.at(-1);
    if (value === undefined || value === null || value === "") return words("nothing");
    if (name === "weight") return `${percent(value)} %`;
    if (name === "decision") return words("decided_" + value);
    if (typeof value === "boolean") return words(value ? "yes" : "no");
    if (name === "order") {
      const text = (id) => (known.find((c) => c.id === id) || { text: id }).text.slice(0, 40);
      return value.map((id, i) => `${i + 1}. ${text(id)}`).join("\n");
    }
    if (["tier", "axis", "kind"].includes(name)) {
      const fields = document.getElementById("criterion-template").content;
      const options = fields.querySelector(`[data-field="${name}"]`).options;
      const option = [...options].find((one) => one.value === value);
      return option ? option.textContent : String(value);
    }
    return typeof value === "object" ? value.text || JSON.stringify(value) : String(value);
  };
})();
