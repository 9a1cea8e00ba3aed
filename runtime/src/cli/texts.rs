//! Texts given on the command line.

use unimo::model::Model;

/// What to tell the user whose text is longer than the model reads.
pub fn cut_warning(model: &Model, text: &str) -> Option<String> {
    let cut = model.cut_off(text);
    (cut > 0).then(|| {
        format!("warning: only the first {} of {} tokens are read of {text:?}", model.text_room(), model.text_room() + cut)
    })
}
