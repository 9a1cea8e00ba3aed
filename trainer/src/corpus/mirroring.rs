//! Captions of mirrored pictures.

/// Exchanges the words left and right.
pub(super) fn mirror_text(text: &str) -> String {
    text.split(' ')
        .map(|word| {
            let bare = word.trim_matches(|c: char| !c.is_alphanumeric());
            match bare.to_ascii_lowercase().as_str() {
                "left" => word.replace(bare, "right"),
                "right" => word.replace(bare, "left"),
                _ => word.to_owned(),
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn mirrored_captions_exchange_left_and_right() {
        for (text, expected) in [
            ("a dog left of a cat", "a dog right of a cat"),
            ("turning Right, then left.", "turning left, then right."),
            ("a bright lefty", "a bright lefty"),
        ] {
            assert_eq!(mirror_text(text), expected);
        }
    }
}
