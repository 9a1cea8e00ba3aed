//! What a scene can hold, and how one is drawn by lot.

use rand::Rng;
use rand::seq::SliceRandom;
use rand_chacha::ChaCha8Rng;
use serde::{Deserialize, Serialize};

/// Declares a closed vocabulary: an enum, all of its values, and the word for each.
macro_rules! vocabulary {
    ($(#[$doc:meta])* $name:ident { $($variant:ident = $word:literal),+ $(,)? }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(rename_all = "snake_case")]
        pub enum $name { $(#[doc = concat!("“", $word, "”")] $variant),+ }

        impl $name {
            /// Every value, in the order of declaration.
            pub const ALL: &'static [Self] = &[$(Self::$variant),+];

            /// The word that captions use.
            #[must_use]
            pub fn word(self) -> &'static str {
                match self { $(Self::$variant => $word),+ }
            }

            /// The value that a word of a caption stands for.
            #[must_use]
            pub fn from_word(word: &str) -> Option<Self> {
                match word { $($word => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

vocabulary! {
    /// Outline of an object.
    Shape { Circle = "circle", Square = "square", Triangle = "triangle", Star = "star", Heart = "heart", Cross = "cross" }
}

vocabulary! {
    /// Colour of an object.
    Colour {
        Red = "red", Orange = "orange", Yellow = "yellow", Green = "green",
        Blue = "blue", Purple = "purple", Black = "black", White = "white",
    }
}

vocabulary! {
    /// Size of an object: a large one is at least 1.6 times as wide as a small one.
    Size { Small = "small", Large = "large" }
}

vocabulary! {
    /// Colour of the ground.
    Ground { White = "white", Gray = "gray", Black = "black", Beige = "beige", Pink = "pink", Brown = "brown" }
}

impl Colour {
    /// The nominal colour in sRGB; a drawing varies it a little.
    #[must_use]
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::Red => [214, 30, 36],
            Self::Orange => [246, 134, 16],
            Self::Yellow => [248, 222, 32],
            Self::Green => [34, 150, 58],
            Self::Blue => [32, 74, 206],
            Self::Purple => [132, 44, 160],
            Self::Black => [20, 20, 22],
            Self::White => [246, 246, 246],
        }
    }
}

impl Ground {
    /// The nominal colour in sRGB; a drawing varies it a little.
    #[must_use]
    pub fn rgb(self) -> [u8; 3] {
        match self {
            Self::White => [236, 236, 234],
            Self::Gray => [140, 142, 146],
            Self::Black => [26, 26, 28],
            Self::Beige => [222, 200, 160],
            Self::Pink => [244, 176, 196],
            Self::Brown => [112, 74, 46],
        }
    }
}

/// Least Euclidean distance in sRGB between an object and the ground that it stands on.
const LEAST_CONTRAST: f32 = 95.0;

fn stands_out(colour: Colour, ground: Ground) -> bool {
    let squares = colour.rgb().into_iter().zip(ground.rgb()).map(|(a, b)| (f32::from(a) - f32::from(b)).powi(2));
    squares.sum::<f32>().sqrt() >= LEAST_CONTRAST
}

/// Where an object's centre lies, in thirds of the picture.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Position {
    TopLeft,
    Top,
    TopRight,
    Left,
    Center,
    Right,
    BottomLeft,
    Bottom,
    BottomRight,
}

impl Position {
    /// Every position, row by row.
    pub const ALL: [Self; 9] = [
        Self::TopLeft,
        Self::Top,
        Self::TopRight,
        Self::Left,
        Self::Center,
        Self::Right,
        Self::BottomLeft,
        Self::Bottom,
        Self::BottomRight,
    ];

    /// Column and row, each 0, 1 or 2 from the top left.
    #[must_use]
    pub fn cell(self) -> (u8, u8) {
        let index = self as u8;
        (index % 3, index / 3)
    }
}

/// One object of a scene. Lengths are fractions of the picture's side; the origin is the top left corner.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Object {
    /// Outline.
    pub shape: Shape,
    /// Colour.
    pub colour: Colour,
    /// Size in words.
    pub size: Size,
    /// Position in words.
    pub position: Position,
    /// Centre, x to the right and y downwards.
    pub centre: [f32; 2],
    /// Radius of the circle that the object is drawn into.
    pub radius: f32,
    /// Turn in radians, clockwise.
    pub turn: f32,
}

/// The ground of a scene.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Background {
    /// Colour.
    pub colour: Ground,
}

/// What a [`Relation`] says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[allow(missing_docs, reason = "the names say it")]
pub enum Predicate {
    LeftOf,
    RightOf,
    Above,
    Below,
}

impl Predicate {
    /// Every predicate.
    pub const ALL: [Self; 4] = [Self::LeftOf, Self::RightOf, Self::Above, Self::Below];

    /// The same relation seen from the other object.
    #[must_use]
    pub fn converse(self) -> Self {
        match self {
            Self::LeftOf => Self::RightOf,
            Self::RightOf => Self::LeftOf,
            Self::Above => Self::Below,
            Self::Below => Self::Above,
        }
    }

    /// Whether the centres of two objects stand in this relation, however slightly.
    #[must_use]
    pub fn holds(self, subject: &Object, object: &Object) -> bool {
        match self {
            Self::LeftOf => subject.centre[0] < object.centre[0],
            Self::RightOf => subject.centre[0] > object.centre[0],
            Self::Above => subject.centre[1] < object.centre[1],
            Self::Below => subject.centre[1] > object.centre[1],
        }
    }
}

/// “Object `subject` is `predicate` object `object`”, by index into [`Graph::objects`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Relation {
    /// Index of the object that is spoken of.
    pub subject: usize,
    /// What is said.
    pub predicate: Predicate,
    /// Index of the object that it is compared with.
    pub object: usize,
}

/// The exact truth about a scene.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Graph {
    /// The ground.
    pub background: Background,
    /// Objects, large ones first, then from left to right. No two share both shape and colour.
    pub objects: Vec<Object>,
    /// Relations that nobody would dispute: the offset along one axis is at least 2½ times that along the other. One per
    /// pair of objects, `subject < object`; a pair that lies diagonally has none.
    pub relations: Vec<Relation>,
}

impl Graph {
    /// What can be said of the scene in words, as one string: scenes with the same signature cannot be told apart by any
    /// caption. Used to keep held-out scenes apart from training scenes.
    #[must_use]
    pub fn signature(&self) -> String {
        let mut objects: Vec<_> = self.objects.iter().map(|o| (o.position, o.size, o.colour, o.shape)).collect();
        objects.sort_unstable();
        let mut text = self.background.colour.word().to_owned();
        for (position, size, colour, shape) in objects {
            let (column, row) = position.cell();
            text += &format!("|{column}{row} {} {} {}", size.word(), colour.word(), shape.word());
        }
        text
    }

    /// The relation between two objects, from the first to the second, when there is a clear one.
    #[must_use]
    pub fn relation(&self, subject: usize, object: usize) -> Option<Predicate> {
        self.relations.iter().find_map(|r| match (r.subject, r.object) {
            pair if pair == (subject, object) => Some(r.predicate),
            pair if pair == (object, subject) => Some(r.predicate.converse()),
            _ => None,
        })
    }
}

/// Centres of the three columns and rows, and how far an object may stray from them.
const CELL_CENTRES: [f32; 3] = [0.22, 0.5, 0.78];
const STRAY: f32 = 0.04;
/// Free space kept between objects and towards the edge.
const GAP: f32 = 0.02;
/// How many times larger the offset along one axis must be for a relation to be clear.
const CLEARLY: f32 = 2.5;

pub(super) fn pick<T: Copy>(rng: &mut ChaCha8Rng, items: &[T]) -> T {
    // u32, not usize: the number of random words drawn must not depend on the machine's word size.
    items[rng.random_range(0..items.len() as u32) as usize]
}

/// Draws a scene of at most `max_objects` objects by lot.
pub(super) fn sample(rng: &mut ChaCha8Rng, max_objects: usize) -> Graph {
    // One object leaves the fewest words to tell scenes apart, so it is the rarest.
    let counts: &[usize] = &[2, 3, 2, 1, 3, 2, 3, 2, 1, 3];
    let counts: Vec<usize> = counts.iter().copied().filter(|&n| n <= max_objects).collect();
    let count = pick(rng, &counts);
    let ground = pick(rng, Ground::ALL);
    let colours: Vec<Colour> = Colour::ALL.iter().copied().filter(|&c| stands_out(c, ground)).collect();

    let mut kinds: Vec<(Shape, Colour)> = Vec::with_capacity(count);
    while kinds.len() < count {
        let kind = (pick(rng, Shape::ALL), pick(rng, &colours));
        if !kinds.contains(&kind) {
            kinds.push(kind);
        }
    }
    let mut objects = place(rng, &kinds);
    objects.sort_by(|a, b| b.size.cmp(&a.size).then(a.centre[0].total_cmp(&b.centre[0])));
    let relations = relations(&objects);
    Graph { background: Background { colour: ground }, objects, relations }
}

/// Gives sizes and places until nothing overlaps. Three large objects fit into three corners, so this ends.
fn place(rng: &mut ChaCha8Rng, kinds: &[(Shape, Colour)]) -> Vec<Object> {
    loop {
        let mut cells = Position::ALL;
        cells.shuffle(rng);
        let objects: Vec<Object> = kinds
            .iter()
            .zip(cells)
            .map(|(&(shape, colour), position)| {
                let size = pick(rng, Size::ALL);
                let radius = match size {
                    Size::Large => rng.random_range(0.155..0.195f32),
                    Size::Small => rng.random_range(0.075..0.095f32),
                };
                let (column, row) = position.cell();
                let mut axis = |cell: u8| {
                    let centre = CELL_CENTRES[usize::from(cell)] + rng.random_range(-STRAY..STRAY);
                    centre.clamp(radius + GAP, 1.0 - radius - GAP)
                };
                let centre = [axis(column), axis(row)];
                let turn = rng.random_range(-0.2..0.2f32);
                Object { shape, colour, size, position, centre, radius, turn }
            })
            .collect();
        let apart = |a: &Object, b: &Object| {
            let distance = (a.centre[0] - b.centre[0]).hypot(a.centre[1] - b.centre[1]);
            distance >= a.radius + b.radius + GAP
        };
        if objects.iter().enumerate().all(|(i, a)| objects[..i].iter().all(|b| apart(a, b))) {
            return objects;
        }
    }
}

fn relations(objects: &[Object]) -> Vec<Relation> {
    let mut relations = Vec::new();
    for (subject, a) in objects.iter().enumerate() {
        for (object, b) in objects.iter().enumerate().skip(subject + 1) {
            let (dx, dy) = (a.centre[0] - b.centre[0], a.centre[1] - b.centre[1]);
            let predicate = if dx.abs() >= CLEARLY * dy.abs() {
                if dx < 0.0 { Predicate::LeftOf } else { Predicate::RightOf }
            } else if dy.abs() >= CLEARLY * dx.abs() {
                if dy < 0.0 { Predicate::Above } else { Predicate::Below }
            } else {
                continue;
            };
            relations.push(Relation { subject, predicate, object });
        }
    }
    relations
}

#[cfg(test)]
mod tests {
    use rand::SeedableRng;

    use super::*;

    fn graphs() -> Vec<Graph> {
        (0..2000).map(|seed| sample(&mut ChaCha8Rng::seed_from_u64(seed), 3)).collect()
    }

    #[test]
    fn words_and_values_agree() {
        assert!(Shape::ALL.iter().all(|&v| Shape::from_word(v.word()) == Some(v)));
        assert!(Colour::ALL.iter().all(|&v| Colour::from_word(v.word()) == Some(v)));
        assert_eq!(Colour::from_word("grue"), None);
    }

    #[test]
    fn every_ground_leaves_at_least_four_colours() {
        for &ground in Ground::ALL {
            let left = Colour::ALL.iter().filter(|&&c| stands_out(c, ground)).count();
            assert!(left >= 4, "{ground:?} leaves {left}");
        }
    }

    #[test]
    fn objects_stay_inside_apart_and_distinct() {
        for graph in graphs() {
            for (i, a) in graph.objects.iter().enumerate() {
                assert!(a.centre.iter().all(|&c| c >= a.radius && c <= 1.0 - a.radius), "{a:?}");
                let (column, row) = a.position.cell();
                let third = |c: f32| (c * 3.0) as u8;
                assert_eq!((third(a.centre[0]), third(a.centre[1])), (column, row), "{a:?}");
                for b in &graph.objects[..i] {
                    let distance = (a.centre[0] - b.centre[0]).hypot(a.centre[1] - b.centre[1]);
                    assert!(distance > a.radius + b.radius, "{a:?} {b:?}");
                    assert_ne!((a.shape, a.colour), (b.shape, b.colour));
                }
            }
        }
    }

    #[test]
    fn relations_hold_both_ways() {
        for graph in graphs() {
            for r in &graph.relations {
                let (a, b) = (&graph.objects[r.subject], &graph.objects[r.object]);
                assert!(r.predicate.holds(a, b) && r.predicate.converse().holds(b, a));
                assert_eq!(graph.relation(r.object, r.subject), Some(r.predicate.converse()));
            }
        }
    }

    #[test]
    fn everything_occurs() {
        let graphs = graphs();
        let objects: Vec<_> = graphs.iter().flat_map(|g| &g.objects).collect();
        assert!(Shape::ALL.iter().all(|&v| objects.iter().any(|o| o.shape == v)));
        assert!(Colour::ALL.iter().all(|&v| objects.iter().any(|o| o.colour == v)));
        assert!(Position::ALL.iter().all(|&v| objects.iter().any(|o| o.position == v)));
        assert!(Ground::ALL.iter().all(|&v| graphs.iter().any(|g| g.background.colour == v)));
        assert!((1..=3).all(|n| graphs.iter().any(|g| g.objects.len() == n)));
    }
}
