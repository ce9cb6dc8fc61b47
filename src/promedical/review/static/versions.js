/* Two versions of one answer: where they differ, one made of both, and the dialog that asks.
 *
 * Autosave calls `Review.chooseVersions` when the store has another version than the one that a page
 * began from. Nothing is overwritten unseen: what only one side changed is chosen beforehand, what
 * both changed has to be chosen. Values are set as text. Needs `stores.js`.
 */
"use strict";

(() => {
  const Review = (window.Review = window.Review || {});
  const { isObject, same } = Review;

  const keyed = (list) =>
    Array.isArray(list) && list.length > 0 && list.every((e) => isObject(e) && "id" in e);
  const byId = (list) => new Map((list ?? []).map((entry) => [String(entry.id), entry]));
  const asList = (a, b) => (keyed(a) || same(a, [])) && (keyed(b) || same(b, [])) && (keyed(a) || keyed(b));

  /* Where two answers differ: [{path, mine, theirs, prefer}]. Lists of things with an id are
   * compared by id, their order apart ("order"). `prefer` is the side that alone changed since
   * `base`, or null if both did. */
  const differences = (base, mine, theirs, path = []) => {
    if (same(mine, theirs)) return [];
    if (isObject(mine) && isObject(theirs)) {
      const names = [...new Set([...Object.keys(mine), ...Object.keys(theirs)])];
      return names.flatMap((name) =>
        differences(isObject(base) ? base[name] : undefined, mine[name], theirs[name], [...path, name]),
      );
    }
    if (asList(mine, theirs)) {
      const [old, a, b] = [byId(keyed(base) ? base : []), byId(mine), byId(theirs)];
      const ids = [...new Set([...a.keys(), ...b.keys()])];
      const found = ids.flatMap((id) => differences(old.get(id), a.get(id), b.get(id), [...path, id]));
      const orders = [a, b, old].map((m) => [...m.keys()].filter((id) => a.has(id) && b.has(id)));
      return found.concat(differences(orders[2], orders[0], orders[1], [...path, "order"]));
    }
    const prefer = same(base, theirs) ? "mine" : same(base, mine) ? "theirs" : null;
    return [{ path, mine, theirs, prefer }];
  };
  Review.differences = differences;

  /* One answer from two: `pick(path)` is "mine" or "theirs" for every difference. */
  const combine = (mine, theirs, pick, path = []) => {
    if (same(mine, theirs)) return mine;
    if (isObject(mine) && isObject(theirs)) {
      const names = [...new Set([...Object.keys(mine), ...Object.keys(theirs)])];
      const both = names.map((n) => [n, combine(mine[n], theirs[n], pick, [...path, n])]);
      return Object.fromEntries(both.filter(([, value]) => value !== undefined));
    }
    if (asList(mine, theirs)) {
      const [a, b] = [byId(mine), byId(theirs)];
      const orders = [a, b].map((m) => [...m.keys()].filter((id) => a.has(id) && b.has(id)));
      const first = same(...orders) || pick([...path, "order"]) === "mine" ? [a, b] : [b, a];
      const ids = [...new Set([...first[0].keys(), ...first[1].keys()])];
      return ids
        .map((id) => combine(a.get(id), b.get(id), pick, [...path, id]))
        .filter((entry) => entry !== undefined);
    }
    return pick(path) === "mine" ? mine : theirs;
  };
  Review.combine = combine;

  const element = (name, properties = {}, ...children) => {
    const made = document.createElement(name);
    for (const [key, value] of Object.entries(properties)) {
      if (key.includes("-")) made.setAttribute(key, value);
      else made[key] = value;
    }
    made.append(...children);
    return made;
  };

  const shownValue = (value) => {
    if (value === undefined || value === null || value === "") return Review.words("nothing");
    if (typeof value === "object") return value.text ? String(value.text) : JSON.stringify(value);
    return String(value);
  };

  /* Shows two versions side by side and resolves with the one that the person made of them. The
   * dialog cannot be left without a choice, and what differs on both sides has to be chosen. */
  Review.chooseVersions = ({ base, mine, theirs, label, value }) => {
    const fields = differences(base, mine, theirs);
    const picks = fields.map((field) => field.prefer);
    const pathKey = (path) => JSON.stringify(path);
    const words = Review.words;
    const rows = fields.map((field, i) => {
      const name = label ? label(field.path, mine, theirs) : field.path.join(" › ");
      const option = (side) => {
        const text = value ? value(field.path, field[side]) : shownValue(field[side]);
        const radio = element("input", { type: "radio", name: `choice-${i}`, value: side });
        radio.checked = picks[i] === side;
        radio.addEventListener("change", () => {
          picks[i] = side;
          ready();
        });
        const title = words(side === "mine" ? "conflictMine" : "conflictTheirs");
        return element(
          "label",
          { className: "conflict-option" },
          radio,
          element("span", { className: "conflict-side", textContent: title }),
          element("span", { className: "conflict-value", textContent: text }),
        );
      };
      return element(
        "fieldset",
        { className: "conflict-field" },
        element("legend", { textContent: name }),
        option("mine"),
        option("theirs"),
      );
    });
    const button = (text, className) => element("button", { type: "button", textContent: text, className });
    const use = button(words("conflictUse"), "primary");
    const allMine = button(words("conflictAllMine"), "");
    const allTheirs = button(words("conflictAllTheirs"), "");
    const ready = () => {
      use.disabled = picks.some((side) => side === null);
    };
    const dialog = element(
      "dialog",
      { className: "conflict", "aria-labelledby": "conflict-title" },
      element("h2", { id: "conflict-title", textContent: words("conflictTitle") }),
      element("p", { textContent: words("conflictExplain") }),
      element("div", { className: "conflict-fields" }, ...rows),
      element("div", { className: "actions" }, use, allMine, allTheirs),
    );
    dialog.addEventListener("cancel", (event) => event.preventDefault());
    // Escape pressed twice closes a dialog whatever its cancel event says.
    dialog.addEventListener("close", () => dialog.isConnected && dialog.showModal());
    document.body.append(dialog);
    ready();
    dialog.showModal();
    return new Promise((resolve) => {
      const end = (answer) => {
        dialog.remove();
        resolve(answer);
      };
      use.addEventListener("click", () => {
        const sides = new Map(fields.map((field, i) => [pathKey(field.path), picks[i]]));
        end(combine(mine, theirs, (path) => sides.get(pathKey(path))));
      });
      allMine.addEventListener("click", () => end(mine));
      allTheirs.addEventListener("click", () => end(theirs));
    });
  };
})();
