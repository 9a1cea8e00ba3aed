//! Drawn scenes: a corpus of our own with exact ground truth.
//!
//! A scene is one to three coloured shapes on a plain, slightly textured ground. Its [`Graph`] says what is drawn; the
//! picture, five true captions and a list of questions with answers all follow from the graph, so that captions, retrieval
//! and answers can be judged without a human. Scene `index` of seed `seed` is always the same scene, whatever was
//! generated before it.
//!
//! ```
//! use unimo_train::scenes;
//! let scene = scenes::generate(7, 0);
//! assert_eq!(scene.captions.len(), 5);
//! assert!(scene.captions.iter().all(|caption| scenes::caption_is_right(&scene.graph, caption)));
//! assert_eq!(scene.draw().dimensions(), (scenes::SIDE, scenes::SIDE));
//! ```

mod check;
mod corpus;
mod draw;
mod language;
mod scene;

pub use check::{CaptionCheck, Mention, caption_is_right, check_caption};
pub use corpus::{CorpusOptions, CorpusReport, PictureFormat, SceneRecord, read_records, signatures, write_corpus};
pub use language::Question;
pub use scene::{Background, Colour, Graph, Ground, Object, Position, Predicate, Relation, Shape, Size};

use image::RgbImage;
use rand::SeedableRng;
use rand_chacha::ChaCha8Rng;

/// Width and height of a drawn picture in pixels: what the model's image preparation asks for.
pub const SIDE: u32 = 224;

/// Objects of the largest scene.
pub const MAX_OBJECTS: usize = 3;

/// A scene: what is in it, what is said of it and what can be asked about it.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// Ground truth.
    pub graph: Graph,
    /// Five different captions; each is true of the graph and names every object with its colour.
    pub captions: Vec<String>,
    /// Questions with their exact answers.
    pub questions: Vec<Question>,
    /// Seed of what does not belong to the truth: shades, gradient, texture and noise.
    texture_seed: u64,
}

impl Scene {
    /// Draws the scene, [`SIDE`] × [`SIDE`] pixels; the same scene gives the same pixels every time.
    #[must_use]
    pub fn draw(&self) -> RgbImage {
        draw::draw(&self.graph, self.texture_seed)
    }
}

/// Generates scene number `index` of the corpus `seed`, with one to [`MAX_OBJECTS`] objects.
#[must_use]
pub fn generate(seed: u64, index: u64) -> Scene {
    generate_up_to(seed, index, MAX_OBJECTS)
}

/// Generates scene number `index` of the corpus `seed`, with at most `max_objects` objects (held to `1..=`[`MAX_OBJECTS`]).
///
/// Each `(seed, index)` is a ChaCha8 stream of its own, so scenes can be made in any order and in parallel.
#[must_use]
pub fn generate_up_to(seed: u64, index: u64, max_objects: usize) -> Scene {
    let mut rng = ChaCha8Rng::seed_from_u64(seed);
    rng.set_stream(index);
    let graph = scene::sample(&mut rng, max_objects.clamp(1, MAX_OBJECTS));
    let captions = language::captions(&graph, &mut rng);
    let questions = language::questions(&graph, &mut rng);
    let texture_seed = rand::Rng::random(&mut rng);
    Scene { graph, captions, questions, texture_seed }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn a_scene_depends_on_seed_and_index_alone() {
        let scene = generate(1, 5);
        let _ = generate(1, 4);
        assert_eq!(scene, generate(1, 5));
        assert_eq!(scene.draw(), generate(1, 5).draw());
        assert_ne!(scene.graph, generate(1, 6).graph);
        assert_ne!(scene.graph, generate(2, 5).graph);
    }

    #[test]
    fn captions_are_five_different_and_true_in_every_claim() {
        for index in 0..3000 {
            let scene = generate(3, index);
            let distinct: HashSet<_> = scene.captions.iter().collect();
            assert_eq!(distinct.len(), 5, "{:?}", scene.captions);
            for caption in &scene.captions {
                let check = check_caption(&scene.graph, caption);
                assert!(check.is_right() && check.false_claims.is_empty(), "{caption}: {check:?} of {:?}", scene.graph);
            }
        }
    }

    #[test]
    fn captions_tell_scenes_apart() {
        // A retrieval test of 100 scenes asks for R@1 ≥ 80 %: what the words leave open must stay far below 20 %.
        let scenes: Vec<_> = (0..100).map(|index| generate(11, index)).collect();
        let mut ambiguous = 0;
        for (index, scene) in scenes.iter().enumerate() {
            for caption in &scene.captions {
                let also_true = |other: &Scene| {
                    let check = check_caption(&other.graph, caption);
                    check.is_right() && check.false_claims.is_empty()
                };
                ambiguous += usize::from(scenes.iter().enumerate().any(|(other, s)| other != index && also_true(s)));
            }
        }
        assert!(ambiguous <= 15, "{ambiguous} of 500 captions fit another scene too");
    }

    #[test]
    fn graphs_survive_json() {
        let graph = generate(1, 2).graph;
        let json = serde_json::to_string(&graph).unwrap();
        assert_eq!(serde_json::from_str::<Graph>(&json).unwrap(), graph);
    }

    #[test]
    fn fewer_objects_can_be_asked_for() {
        for (limit, most) in [(0, 1), (1, 1), (2, 2), (3, 3), (9, 3)] {
            let counts: Vec<_> = (0..200).map(|index| generate_up_to(5, index, limit).graph.objects.len()).collect();
            assert_eq!((counts.iter().min(), counts.iter().max()), (Some(&1), Some(&most)));
        }
    }
}
