// The page: what the server says of itself, the four views as tabs, the theme, and the dialog for the API key.

import { changeKey, callJson, hasKey, onKeyNeeded } from "./api.js";
import { startChat } from "./chat.js";
import { startCluster } from "./cluster.js";
import { startDeepStack } from "./deepstack.js";
import { byId, roving, show } from "./dom.js";
import { startTokens } from "./tokens.js";

const VIEWS = ["chat", "deepstack", "tokens", "cluster"];
const TITLES = { chat: "Chat", deepstack: "DeepStack", tokens: "Tokens", cluster: "Cluster" };
const THEMES = ["auto", "light", "dark"];
const info = {}; // what `/page/info` says
const opened = {}; // what each view does when it is opened, with the turn to look at if there is one

startTheme();
startKeyDialog();
start();

async function start() {
  Object.assign(info, await loadedInfo());
  showServer();
  startChat(info, openView);
  opened.deepstack = startDeepStack(info, byId("view-deepstack"));
  opened.tokens = startTokens(info, byId("view-tokens"));
  opened.cluster = startCluster(byId("view-cluster"));
  startTabs();
  document.body.dataset.ready = "true";
}

function showServer() {
  byId("server").textContent = [info.model, info.role, `v${info.version}`].filter(Boolean).join(" · ");
  byId("key-button").hidden = !info.needs_key;
}

/** With a key, the server tells more, such as the model's name. */
async function learnMore() {
  Object.assign(info, await loadedInfo());
  showServer();
}

/** `/page/info` once the model is loaded; until then the banner tells what the page waits for. */
async function loadedInfo() {
  for (;;) {
    try {
      const told = await callJson("/page/info");
      if (!told.loading) {
        show(byId("banner"), "");
        return told;
      }
      show(byId("banner"), "The model is loading: the page opens as soon as it is ready.");
    } catch (failure) {
      show(byId("banner"), failure.message);
    }
    await new Promise((resolve) => { setTimeout(resolve, 1000); });
  }
}

function startTabs() {
  const tabs = VIEWS.map((view) => byId(`tab-${view}`));
  roving(document.querySelector("[role=tablist]"), tabs, (index) => openView(VIEWS[index]));
  tabs.forEach((tab, index) => tab.addEventListener("click", () => openView(VIEWS[index])));
  const named = () => (VIEWS.includes(location.hash.slice(1)) ? location.hash.slice(1) : "chat");
  addEventListener("hashchange", () => openView(named()));
  openView(named());
}

function openView(name, turn = null) {
  if (document.body.dataset.view === name && !turn) return;
  for (const view of VIEWS) {
    byId(`view-${view}`).hidden = view !== name;
    byId(`tab-${view}`).setAttribute("aria-selected", String(view === name));
    byId(`tab-${view}`).setAttribute("tabindex", view === name ? "0" : "-1");
  }
  document.body.dataset.view = name;
  document.title = `${TITLES[name]} – deepstack-jax`;
  history.replaceState(null, "", `#${name}`);
  if (turn) byId(`tab-${name}`).focus();
  opened[name]?.(turn);
}

function startTheme() {
  let theme = 0;
  byId("theme").addEventListener("click", () => {
    theme = (theme + 1) % THEMES.length;
    const name = THEMES[theme];
    document.documentElement.dataset.theme = name;
    byId("theme").textContent = `Theme: ${name}`;
    byId("theme").setAttribute("aria-label", `Theme: ${name === "auto" ? "as the system" : name}`);
  });
}

function startKeyDialog() {
  const [dialog, form, field] = [byId("key-dialog"), byId("key-form"), byId("key")];
  onKeyNeeded((message) => new Promise((resolve) => {
    byId("key-message").textContent = message;
    field.value = "";
    const end = (value) => {
      field.value = "";
      form.onsubmit = dialog.onclose = null;
      dialog.close();
      resolve(value);
    };
    form.onsubmit = (event) => {
      event.preventDefault();
      end(field.value.trim());
    };
    dialog.onclose = byId("key-cancel").onclick = () => end(null);
    dialog.showModal();
    field.focus();
  }), learnMore);
  byId("key-button").addEventListener("click", () => {
    changeKey(hasKey() ? "This tab has a key. Type another one to use it instead." : "This server answers only with an API key.");
  });
}
