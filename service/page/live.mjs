export class LiveView {
  constructor(section) {
    this.section = section;
  }

  show() {
    this.section.replaceChildren();
  }
}
