/* The page of an offline pack: one item at a time, answers in this browser, handed back as a file.
 *
 * The items are in #offline-pack. #item-N of the address says which one is shown; going to another
 * one loads the page anew, so that each item starts clean. An adjudication's criteria are decoded
 * only after the overall preference was saved. Saving is OfflineStore of stores.js, the items are
 * RubricEditor and Adjudication, as in the application. Runs from file://, without any connection.
 */
"use strict";

(() => {
  const Review = window.Review;
  const pack = JSON.parse(document.getElementById("offline-pack").textContent);
  const holder = document.getElementById("offline-item");
  const words = document.getElementById("offline-words").dataset;
  const store = new Review.OfflineStore({ pack: pack.pack });
  const HANDED = `promedical-review/handed/${pack.pack}`;
  let entries = new Map();
  let shown = null; // what saves the item on the page: its Autosave

  const word = (name, values = {}) =>
    Object.entries(values).reduce((text, [k, v]) => text.replace(`{${k}}`, String(v)), words[name]);

  const decoded = (text) =>
    new TextDecoder().decode(Uint8Array.from(atob(text), (c) => c.charCodeAt(0)));

  const isDone = (item) => Boolean(entries.get(item.assignment)?.finish);

  const current = () => {
    const asked = /^#item-(\d+)$/.exec(location.hash);
    if (asked && pack.items[asked[1] - 1]) return asked[1] - 1;
    return Math.max(0, pack.items.findIndex((item) => !isDone(item)));
  };

  const open = async (number) => {
    if (shown) await shown.flush();
    location.hash = `#item-${number + 1}`;
    location.reload();
  };

  /* ---- what is kept ---- */

  /* Whether anything that is kept here is still here when it is asked for. */
  const keeps = async () => {
    const probe = new Review.Journal(`offline/${pack.pack}/probe`);
    await probe.write("probe", {});
    const kept = (await probe.entries()).has("probe");
    await probe.remove("probe");
    return kept;
  };

  const latest = () => Math.max(0, ...[...entries.values()].map((entry) => entry.at));

  const handed = () => {
    try {
      return Number(localStorage.getItem(HANDED) ?? 0);
    } catch {
      return 0;
    }
  };

  const refresh = async () => {
    entries = await store.journal.entries();
    const done = pack.items.filter(isDone).length;
    const all = pack.items.length;
    document.getElementById("offline-progress").textContent =
      word("progress", { done, all }) + (done === all ? ` ${word("allDone")}` : "");
    const state = document.getElementById("offline-state");
    state.textContent = word(!entries.size ? "nothing" : latest() > handed() ? "unsaved" : "saved");
    state.className = entries.size && latest() > handed() ? "notice notice-warning" : "hint";
    document.getElementById("offline-save").disabled = !entries.size;
    for (const [number, link] of document.querySelectorAll("#offline-items a").entries()) {
      const item = pack.items[number];
      const name = isDone(item) ? "itemDone" : entries.has(item.assignment) ? "itemStarted" : "item";
      link.setAttribute("aria-label", word(name, { number: number + 1 }));
      link.textContent = isDone(item) ? `${number + 1} ✓` : String(number + 1);
      link.classList.toggle("primary", number === current());
      if (number === current()) link.setAttribute("aria-current", "page");
    }
  };

  /* ---- handing back, and going on from a file ---- */

  const save = async () => {
    if (shown) await shown.flush();
    await refresh();
    const lines = [pack.head, ...(await store.lines())];
    const link = document.createElement("a");
    link.href = URL.createObjectURL(
      new Blob([lines.join("\n") + "\n"], { type: "application/x-ndjson" }),
    );
    const day = new Date().toISOString().slice(0, 16).replace(/[-:]/g, "").replace("T", "-");
    link.download = `${pack.file}-${day}.jsonl`;
    document.body.append(link);
    link.click();
    link.remove();
    setTimeout(() => URL.revokeObjectURL(link.href), 60000);
    try {
      localStorage.setItem(HANDED, String(latest()));
    } catch {
      // Then it goes on saying that the answers are not in a file yet.
    }
    await refresh();
  };

  const load = async (file) => {
    const trouble = document.getElementById("offline-trouble");
    let newer;
    try {
      const lines = (await file.text()).split("\n").filter((line) => line.trim());
      if (JSON.parse(lines[0]).pack !== pack.pack) throw new Error("another pack");
      const known = new Set(pack.items.map((item) => item.assignment));
      newer = lines.slice(1).map((line) => JSON.parse(line));
      newer = newer.filter(
        (entry) =>
          known.has(entry.assignment) &&
          entry.version > (entries.get(entry.assignment)?.version ?? 0),
      );
    } catch {
      trouble.textContent = word("wrongFile");
      trouble.hidden = false;
      return;
    }
    for (const { pack: _, at: __, ...entry } of newer) await store.journal.write(entry.assignment, entry);
    alert(word("loaded", { n: newer.length }));
    location.reload();
  };

  /* ---- one item ---- */

  const nextOpen = async () => {
    await refresh();
    const at = current();
    const order = [...pack.items.keys()].map((i) => (at + 1 + i) % pack.items.length);
    const next = order.find((i) => !isDone(pack.items[i]));
    return open(next === undefined ? at : next);
  };

  /* A finished item, with a way to change it again. */
  const again = (item, entry) => {
    const note = document.createElement("p");
    note.className = "notice notice-good row";
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = word("again");
    button.addEventListener("click", async () => {
      const { assignment, version: base, answer } = entry;
      const attempt = { assignment, base, answer, save: Review.newId(), seconds: 0, finish: false };
      await store.put(attempt);
      location.reload();
    });
    note.append(`${word("done")} `, button);
    holder.prepend(note);
  };

  const rubric = (item, entry) => {
    holder.append(document.getElementById("rubric-item").content.cloneNode(true));
    const data = { ...item.data, version: entry?.version ?? 0, done: isDone(item) };
    data.answer = entry?.answer ?? item.answer;
    const root = holder.querySelector("[data-rubric-editor]");
    const editor = new Review.RubricEditor(root, data, store);
    root.addEventListener("rubric-done", nextOpen);
    editor.start();
    Review.editor = editor;
    return editor.autosave;
  };

  const adjudication = (item, entry) => {
    const answer = entry?.answer ?? item.answer;
    const part = answer.preference_given ? "criteria" : "preference";
    if (!item.parts[part]) {
      const note = document.createElement("p");
      note.className = "notice";
      note.textContent = word("wait");
      holder.append(note);
      return null;
    }
    const page = new DOMParser().parseFromString(decoded(item.parts[part]), "text/html");
    holder.append(...page.body.childNodes);
    const root = holder.querySelector(".adjudication");
    if (isDone(item)) {
      root.dataset.stage = "done";
      root.querySelector(".dock").hidden = true;
    }
    const version = entry?.version ?? 0;
    const options = { version, answer, next: nextOpen };
    root.review = new Review.Adjudication(root, store, options);
    return root.review.autosave;
  };

  const start = async () => {
    if (!(await keeps())) {
      const trouble = document.getElementById("offline-trouble");
      trouble.textContent = word("noStorage");
      trouble.hidden = false;
      return;
    }
    const list = document.getElementById("offline-items");
    for (const number of pack.items.keys()) {
      const link = document.createElement("a");
      link.href = `#item-${number + 1}`;
      link.className = "button";
      link.addEventListener("click", (event) => {
        event.preventDefault();
        open(number);
      });
      const entry = document.createElement("li");
      entry.append(link);
      list.append(entry);
    }
    entries = await store.journal.entries();
    const at = current();
    if (location.hash !== `#item-${at + 1}`) history.replaceState(null, "", `#item-${at + 1}`);
    const item = pack.items[at];
    const entry = entries.get(item.assignment);
    const made = { rubrics: rubric, adjudication }[pack.kind](item, entry);
    shown = isDone(item) ? null : made;
    if (isDone(item)) again(item, entry);
    await refresh();
    document.getElementById("offline-save").addEventListener("click", save);
    const file = document.getElementById("offline-load");
    file.addEventListener("change", () => file.files[0] && load(file.files[0]));
    setInterval(refresh, 2000);
  };

  start();
})();
