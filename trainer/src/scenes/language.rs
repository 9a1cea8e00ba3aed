//! Captions of a scene graph, and questions about it.
//!
//! Every caption names every object by colour and shape; four of the five also tell the sizes, and most tell where things
//! are, because captions that fit many scenes cannot be told apart by retrieval. The English is American, as in the
//! caption collections that the model is trained on.

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

use super::scene::{Colour, Graph, Object, Position, Predicate, Shape, Size, pick};

/// A question about a scene with its exact answer.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Question {
    /// The question, lower case, with its question mark.
    pub question: String,
    /// The answer: a word or a short phrase.
    pub answer: String,
}

/// Writes five different captions.
pub(super) fn captions(graph: &Graph, rng: &mut ChaCha8Rng) -> Vec<String> {
    let mut forms = [Form::List, Form::Placed, Form::Related, Form::Grounded, Form::Terse];
    forms.shuffle(rng);
    let mut captions: Vec<String> = Vec::with_capacity(forms.len());
    for form in forms {
        let mut caption = write(graph, form, rng);
        // A form falls back to another where the scene offers nothing for it, so two may coincide; both vary by lot.
        while captions.contains(&caption) {
            caption = write(graph, if rng.random_bool(0.5) { form } else { Form::Placed }, rng);
        }
        captions.push(caption);
    }
    captions
}

#[derive(Clone, Copy, PartialEq)]
enum Form {
    /// “a large red circle and a small blue star”
    List,
    /// “a large red circle on the left and a small blue star in the center”
    Placed,
    /// “a large red circle to the left of a small blue star”
    Related,
    /// “a large red circle and a small blue star on a gray background”
    Grounded,
    /// “a red circle above a blue star”: no sizes
    Terse,
}

fn write(graph: &Graph, form: Form, rng: &mut ChaCha8Rng) -> String {
    let objects: Vec<&Object> = graph.objects.iter().collect();
    match form {
        // One shape alone is told apart by where it is.
        Form::List if objects.len() == 1 => write(graph, Form::Placed, rng),
        Form::List => {
            let list = join(objects.iter().map(|o| noun_phrase(o, true, rng)).collect());
            pick(rng, &["", "", "there is ", counted(objects.len())]).to_owned() + &list
        }
        Form::Placed => {
            let placed = join(objects.iter().map(|o| noun_phrase(o, true, rng) + " " + place(o, rng)).collect());
            let openings: &[&str] = match objects.len() {
                1 => &["", "", "there is ", "a picture of ", "an image of "],
                _ => &["", "", "", "there is "],
            };
            pick(rng, openings).to_owned() + &placed
        }
        Form::Grounded => {
            let mut list = join(objects.iter().map(|o| noun_phrase(o, true, rng)).collect());
            if objects.len() == 1 && rng.random_bool(0.6) {
                list = list + " " + place(objects[0], rng);
            }
            let link = pick(rng, &["on", "on", "against"]);
            format!("{list} {link} a {} background", graph.background.colour.word())
        }
        Form::Related => related(graph, true, rng).unwrap_or_else(|| write(graph, Form::Placed, rng)),
        Form::Terse => related(graph, false, rng)
            .unwrap_or_else(|| join(objects.iter().map(|o| noun_phrase(o, false, rng) + " " + place(o, rng)).collect())),
    }
}

/// Relates two objects, and places a third; none when no two objects stand in a clear relation.
fn related(graph: &Graph, sizes: bool, rng: &mut ChaCha8Rng) -> Option<String> {
    if graph.relations.is_empty() {
        return None;
    }
    let relation = pick(rng, &graph.relations);
    let (mut subject, mut predicate, mut object) = (relation.subject, relation.predicate, relation.object);
    if rng.random_bool(0.3) {
        (subject, predicate, object) = (object, predicate.converse(), subject);
    }
    let verb = if graph.objects.len() == 2 { pick(rng, &["", "", "is "]) } else { "" };
    let mut caption = format!(
        "{} {verb}{} {}",
        noun_phrase(&graph.objects[subject], sizes, rng),
        relating(predicate, rng),
        noun_phrase(&graph.objects[object], sizes, rng)
    );
    for (index, other) in graph.objects.iter().enumerate() {
        if index != subject && index != object {
            caption += &format!(", and {} {}", noun_phrase(other, sizes, rng), place(other, rng));
        }
    }
    Some(caption)
}

fn noun_phrase(object: &Object, sizes: bool, rng: &mut ChaCha8Rng) -> String {
    let size = match object.size {
        Size::Large => pick(rng, &["large", "large", "big"]),
        Size::Small => pick(rng, &["small", "small", "little"]),
    };
    let (colour, shape) = (object.colour.word(), object.shape.word());
    match (sizes, object.colour) {
        (true, _) => format!("a {size} {colour} {shape}"),
        (false, Colour::Orange) => format!("an {colour} {shape}"),
        (false, _) => format!("a {colour} {shape}"),
    }
}

fn place(object: &Object, rng: &mut ChaCha8Rng) -> &'static str {
    match object.position {
        Position::TopLeft => pick(rng, &["in the top left corner", "in the top left corner", "at the top left"]),
        Position::Top => "at the top",
        Position::TopRight => pick(rng, &["in the top right corner", "in the top right corner", "at the top right"]),
        Position::Left => pick(rng, &["on the left", "on the left", "on the left side"]),
        Position::Center => pick(rng, &["in the center", "in the center", "in the middle"]),
        Position::Right => pick(rng, &["on the right", "on the right", "on the right side"]),
        Position::BottomLeft => pick(rng, &["in the bottom left corner", "in the bottom left corner", "at the bottom left"]),
        Position::Bottom => "at the bottom",
        Position::BottomRight => pick(rng, &["in the bottom right corner", "in the bottom right corner", "at the bottom right"]),
    }
}

fn relating(predicate: Predicate, rng: &mut ChaCha8Rng) -> &'static str {
    match predicate {
        Predicate::LeftOf => pick(rng, &["to the left of", "to the left of", "left of"]),
        Predicate::RightOf => pick(rng, &["to the right of", "to the right of", "right of"]),
        Predicate::Above => "above",
        Predicate::Below => pick(rng, &["below", "below", "under"]),
    }
}

fn counted(objects: usize) -> &'static str {
    match objects {
        2 => "there are two shapes, ",
        3 => "there are three shapes, ",
        _ => "",
    }
}

fn join(mut phrases: Vec<String>) -> String {
    let last = phrases.pop().unwrap_or_default();
    if phrases.is_empty() { last } else { format!("{} and {last}", phrases.join(", ")) }
}

fn number(n: usize) -> &'static str {
    ["none", "one", "two", "three"].get(n).copied().unwrap_or("many")
}

fn yes_no(yes: bool) -> &'static str {
    if yes { "yes" } else { "no" }
}

/// Asks what can be asked without ambiguity: “the star” only where there is one star, “the red shape” only where one is red.
pub(super) fn questions(graph: &Graph, rng: &mut ChaCha8Rng) -> Vec<Question> {
    let mut asked = Vec::new();
    let mut ask = |question: String, answer: &str| asked.push(Question { question, answer: answer.to_owned() });
    ask("how many shapes are there?".into(), number(graph.objects.len()));
    ask("what color is the background?".into(), graph.background.colour.word());

    let of_shape = |shape: Shape| graph.objects.iter().filter(|o| o.shape == shape).count();
    let of_colour = |colour: Colour| graph.objects.iter().filter(|o| o.colour == colour).count();
    let counted = pick(rng, Shape::ALL);
    ask(format!("how many {} are there?", plural(counted)), number(of_shape(counted)));

    for object in &graph.objects {
        let (colour, shape) = (object.colour.word(), object.shape.word());
        let name = if of_shape(object.shape) == 1 { shape.to_owned() } else { format!("{colour} {shape}") };
        if of_shape(object.shape) == 1 {
            ask(format!("what color is the {shape}?"), colour);
        }
        if of_colour(object.colour) == 1 {
            ask(format!("what shape is {colour}?"), shape);
        }
        ask(format!("how big is the {name}?"), object.size.word());
        ask(format!("where is the {name}?"), where_answer(object.position));
    }

    // Half of the yes/no questions are about what is there, half about what is not.
    let (shape, colour) = match rng.random_bool(0.5) {
        true => (graph.objects[0].shape, graph.objects[0].colour),
        false => (pick(rng, Shape::ALL), pick(rng, Colour::ALL)),
    };
    let present = graph.objects.iter().any(|o| (o.shape, o.colour) == (shape, colour));
    let article = if colour == Colour::Orange { "an" } else { "a" };
    ask(format!("is there {article} {} {}?", colour.word(), shape.word()), yes_no(present));

    for relation in &graph.relations {
        let truth = rng.random_bool(0.5);
        let predicate = if truth { relation.predicate } else { relation.predicate.converse() };
        let name = |index: usize| {
            let o = &graph.objects[index];
            format!("the {} {}", o.colour.word(), o.shape.word())
        };
        let words = match predicate {
            Predicate::LeftOf => "to the left of",
            Predicate::RightOf => "to the right of",
            Predicate::Above => "above",
            Predicate::Below => "below",
        };
        ask(format!("is {} {words} {}?", name(relation.subject), name(relation.object)), yes_no(truth));
    }
    asked
}

fn plural(shape: Shape) -> String {
    let word = shape.word();
    if word.ends_with('s') { format!("{word}es") } else { format!("{word}s") }
}

fn where_answer(position: Position) -> &'static str {
    match position {
        Position::TopLeft => "top left",
        Position::Top => "top",
        Position::TopRight => "top right",
        Position::Left => "left",
        Position::Center => "center",
        Position::Right => "right",
        Position::BottomLeft => "bottom left",
        Position::Bottom => "bottom",
        Position::BottomRight => "bottom right",
    }
}

#[cfg(test)]
mod tests {
    use crate::scenes::generate;

    #[test]
    fn answers_follow_from_the_graph() {
        let mut yes = 0;
        let mut no = 0;
        for index in 0..500 {
            let scene = generate(21, index);
            for q in &scene.questions {
                let words: Vec<&str> = q.question.trim_end_matches('?').split(' ').collect();
                let object = |name: &[&str]| {
                    let fits = |o: &&crate::scenes::Object| name.iter().all(|&w| w == o.shape.word() || w == o.colour.word());
                    let found: Vec<_> = scene.graph.objects.iter().filter(fits).collect();
                    assert_eq!(found.len(), 1, "{}: names {} objects", q.question, found.len());
                    found[0].clone()
                };
                match words[..] {
                    ["what", "color", "is", "the", "background"] => assert_eq!(q.answer, scene.graph.background.colour.word()),
                    ["what", "color", "is", "the", ref name @ ..] => assert_eq!(q.answer, object(name).colour.word()),
                    ["what", "shape", "is", colour] => assert_eq!(q.answer, object(&[colour]).shape.word()),
                    ["how", "big", "is", "the", ref name @ ..] => assert_eq!(q.answer, object(name).size.word()),
                    ["where", "is", "the", ref name @ ..] => {
                        let at = object(name).position;
                        assert_eq!(q.answer.replace(' ', ""), format!("{at:?}").to_lowercase());
                    }
                    ["is", "the", c1, s1, ref relation @ .., "the", c2, s2] => {
                        let (a, b) = (object(&[c1, s1]), object(&[c2, s2]));
                        let (dx, dy) = (a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]);
                        let holds = match relation.join(" ").as_str() {
                            "to the left of" => dx < 0.0,
                            "to the right of" => dx > 0.0,
                            "above" => dy < 0.0,
                            "below" => dy > 0.0,
                            other => panic!("{other}"),
                        };
                        assert_eq!(q.answer == "yes", holds, "{}", q.question);
                        if holds { yes += 1 } else { no += 1 }
                    }
                    ["is", "there", _, colour, shape] => {
                        let there = scene.graph.objects.iter().any(|o| o.colour.word() == colour && o.shape.word() == shape);
                        assert_eq!(q.answer == "yes", there);
                    }
                    ["how", "many", ..] => {}
                    _ => panic!("unknown question: {}", q.question),
                }
            }
        }
        assert!(yes > 100 && no > 100, "answers are one-sided: {yes} yes, {no} no");
    }
}
