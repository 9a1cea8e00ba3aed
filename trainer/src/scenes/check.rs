//! Judges a caption against a scene graph.

use serde::Serialize;

use super::scene::{Colour, Graph, Object, Position, Predicate, Shape, Size};

/// An object as a caption names it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Mention {
    /// Size, where the caption tells it.
    pub size: Option<Size>,
    /// Colour, where the caption tells it.
    pub colour: Option<Colour>,
    /// Shape.
    pub shape: Shape,
}

/// What a caption says rightly and wrongly about a scene.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct CaptionCheck {
    /// Mentions that fit no object: a colour and shape that is not there, one named twice, or one without a colour.
    pub wrong: Vec<Mention>,
    /// Indices of the objects that the caption does not name.
    pub missing: Vec<usize>,
    /// Further claims that are false, in words: sizes, places, relations, the ground.
    pub false_claims: Vec<String>,
}

impl CaptionCheck {
    /// Whether the caption names exactly the objects of the scene, each with its colour. Sizes, places and relations are
    /// not asked for here; see [`CaptionCheck::false_claims`].
    #[must_use]
    pub fn is_right(&self) -> bool {
        self.wrong.is_empty() && self.missing.is_empty()
    }
}

/// Whether a caption names exactly the objects of a scene with their colours, each of them once.
#[must_use]
pub fn caption_is_right(graph: &Graph, caption: &str) -> bool {
    check_caption(graph, caption).is_right()
}

/// A mention and the words between it and the next one.
struct Clause<'a> {
    mention: Mention,
    after: Vec<&'a str>,
}

/// Checks a caption in the language of the scenes, whatever its wording. Case and punctuation do not matter.
#[must_use]
pub fn check_caption(graph: &Graph, caption: &str) -> CaptionCheck {
    let caption = caption.to_lowercase();
    let words: Vec<&str> = caption.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
    let (clauses, ground) = parse(&words);

    let mut check = CaptionCheck::default();
    let mut named: Vec<Option<usize>> = Vec::with_capacity(clauses.len());
    for clause in &clauses {
        let mention = clause.mention;
        let fits = |o: &Object| o.shape == mention.shape && Some(o.colour) == mention.colour;
        let found = graph.objects.iter().position(fits).filter(|index| !named.contains(&Some(*index)));
        if found.is_none() {
            check.wrong.push(mention);
        }
        named.push(found);
    }
    check.missing = (0..graph.objects.len()).filter(|index| !named.contains(&Some(*index))).collect();

    if let Some(word) = ground
        && word != graph.background.colour.word()
    {
        check.false_claims.push(format!("{word} background"));
    }
    for (at, (clause, &index)) in clauses.iter().zip(&named).enumerate() {
        let Some(subject) = index.map(|i| &graph.objects[i]) else { continue };
        let name = format!("{} {}", subject.colour.word(), subject.shape.word());
        if let Some(size) = clause.mention.size
            && size != subject.size
        {
            check.false_claims.push(format!("{} {name}", size.word()));
        }
        if let Some(predicate) = stated_relation(&clause.after) {
            let object = named.get(at + 1).copied().flatten().map(|i| &graph.objects[i]);
            if object.is_some_and(|object| !predicate.holds(subject, object)) {
                check.false_claims.push(format!("{name} {}", clause.after.join(" ")));
            }
        } else if !stated_place_holds(&clause.after, subject.position) {
            check.false_claims.push(format!("{name} {}", clause.after.join(" ")));
        }
    }
    check
}

/// Splits a caption at the shapes that it names; also gives the word before “background”.
fn parse<'a>(words: &[&'a str]) -> (Vec<Clause<'a>>, Option<&'a str>) {
    let mut clauses: Vec<Clause<'a>> = Vec::new();
    let mut ground = None;
    let (mut size, mut colour) = (None, None);
    for (at, &word) in words.iter().enumerate() {
        if let Some(shape) = Shape::from_word(word) {
            clauses.push(Clause { mention: Mention { size, colour, shape }, after: Vec::new() });
        } else if word == "background" {
            ground = at.checked_sub(1).map(|before| words[before]);
        } else if let Some(value) = size_of(word) {
            size = Some(value);
            continue;
        } else if let Some(value) = Colour::from_word(word) {
            colour = Some(value);
            continue;
        } else if let Some(clause) = clauses.last_mut() {
            clause.after.push(word);
        }
        // Adjectives belong to the noun that follows at once.
        (size, colour) = (None, None);
    }
    (clauses, ground)
}

fn size_of(word: &str) -> Option<Size> {
    match word {
        "large" | "big" => Some(Size::Large),
        "small" | "little" => Some(Size::Small),
        _ => None,
    }
}

fn stated_relation(after: &[&str]) -> Option<Predicate> {
    if after.contains(&"of") {
        match after {
            [.., "left", "of"] | [.., "left", "of", "a" | "an" | "the"] => return Some(Predicate::LeftOf),
            [.., "right", "of"] | [.., "right", "of", "a" | "an" | "the"] => return Some(Predicate::RightOf),
            _ => {}
        }
    }
    after.iter().find_map(|&word| match word {
        "above" => Some(Predicate::Above),
        "below" | "under" => Some(Predicate::Below),
        _ => None,
    })
}

/// “on the left” is true of an object in the top left corner too; “in the center” only of one in the centre.
fn stated_place_holds(after: &[&str], position: Position) -> bool {
    let (column, row) = position.cell();
    after.iter().all(|&word| match word {
        "left" => column == 0,
        "right" => column == 2,
        "top" => row == 0,
        "bottom" => row == 2,
        "corner" => column != 1 && row != 1,
        "center" | "middle" => position == Position::Center,
        _ => true,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::scenes::{Background, Ground, Relation};

    fn graph() -> Graph {
        let object = |shape, colour, size, position: Position| {
            let (column, row) = position.cell();
            let centre = [0.2 + 0.3 * f32::from(column), 0.2 + 0.3 * f32::from(row)];
            Object { shape, colour, size, position, centre, radius: 0.1, turn: 0.0 }
        };
        Graph {
            background: Background { colour: Ground::Gray },
            objects: vec![
                object(Shape::Circle, Colour::Red, Size::Large, Position::Left),
                object(Shape::Square, Colour::Blue, Size::Small, Position::Right),
            ],
            relations: vec![Relation { subject: 0, predicate: Predicate::LeftOf, object: 1 }],
        }
    }

    #[test]
    fn right_captions() {
        for caption in [
            "a large red circle to the left of a small blue square",
            "A blue square, and a RED circle.",
            "a blue square right of a big red circle",
            "there are two shapes, a red circle on the left and a little blue square on the right side",
            "a red circle and a blue square on a gray background",
        ] {
            let check = check_caption(&graph(), caption);
            assert!(check.is_right() && check.false_claims.is_empty(), "{caption}: {check:?}");
        }
    }

    #[test]
    fn wrong_captions() {
        for (caption, wrong, missing) in [
            ("", 0, 2),
            ("a red circle", 0, 1),
            ("a blue circle and a red square", 2, 2),
            ("a red circle and a blue square and a green star", 1, 0),
            ("a red circle and a red circle and a blue square", 1, 0),
            ("a circle and a blue square", 1, 1),
            ("a red and a circle and a blue square", 1, 1),
            ("a red circle on a blue background", 0, 1),
            ("a dog runs in the park", 0, 2),
        ] {
            let check = check_caption(&graph(), caption);
            assert_eq!((check.wrong.len(), check.missing.len()), (wrong, missing), "{caption}: {check:?}");
            assert!(!caption_is_right(&graph(), caption));
        }
    }

    #[test]
    fn false_claims_beside_right_objects() {
        for (caption, claims) in [
            ("a small red circle and a large blue square", vec!["small red circle", "large blue square"]),
            ("a red circle to the right of a blue square", vec!["red circle to the right of a"]),
            ("a red circle at the top and a blue square", vec!["red circle at the top and a"]),
            ("a red circle in the center and a blue square", vec!["red circle in the center and a"]),
            ("a red circle and a blue square on a white background", vec!["white background"]),
        ] {
            let check = check_caption(&graph(), caption);
            assert!(check.is_right(), "{caption}");
            assert_eq!(check.false_claims, claims, "{caption}");
        }
    }
}
