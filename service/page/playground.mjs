export class PlaygroundView {
  constructor(section) {
    this.section = section;
  }

  show() {
    this.section.replaceChildren();
  }
}
