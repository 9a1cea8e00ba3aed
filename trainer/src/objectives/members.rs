//! Who belongs to whom in a step's contrasts.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::chunk::KINDS;
use crate::ops::Relations;

/// Whose embeddings a rank brings to a step's contrasts, in the order of [`Encoded`](super::chunk::Encoded). Pictures are numbered
/// over all ranks, in their order.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Members {
    /// Pictures that are encoded for the contrasts.
    pub images: Range<usize>,
    /// Picture of each caption.
    pub image_of_text: Vec<usize>,
    /// Picture of each image retrieved for one.
    pub retrieved_image_of: Vec<usize>,
    /// Picture of each text retrieved for one.
    pub retrieved_text_of: Vec<usize>,
    /// Picture of each pair encoded jointly.
    pub joint_image_of: Vec<usize>,
    /// Whether each of these belongs together: 1 or 0.
    pub joint_labels: Vec<f32>,
    /// Pictures of one caption each that are in the first contrast alone.
    pub further: usize,
}

impl Members {
    /// Rows of each kind of what is encoded.
    pub fn counts(&self) -> [usize; KINDS] {
        [
            self.images.len(),
            self.image_of_text.len(),
            self.retrieved_image_of.len(),
            self.retrieved_text_of.len(),
            self.joint_image_of.len(),
            self.further,
            self.further,
        ]
    }

    /// Whether all of it belongs to this rank's pictures.
    pub fn are_complete(&self) -> bool {
        let of = [&self.image_of_text, &self.retrieved_image_of, &self.retrieved_text_of, &self.joint_image_of];
        of.into_iter().flatten().all(|image| self.images.contains(image)) && self.joint_labels.len() == self.joint_image_of.len()
    }

    /// Number of pictures that have something to be attracted to.
    pub fn contrasted(&self) -> usize {
        let mut attracted = vec![false; self.images.len()];
        let joint = self.joint_image_of.iter().zip(&self.joint_labels).filter(|(_, label)| **label > 0.5);
        for image in self.image_of_text.iter().chain(&self.retrieved_text_of).chain(joint.map(|(image, _)| image)) {
            attracted[image - self.images.start] = true;
        }
        attracted.into_iter().filter(|attracted| *attracted).count()
    }

    /// Who belongs to whom, of this rank's pictures. Before them come others' pictures and captions, so many.
    pub fn relations(&self, first_text: usize) -> Relations {
        let own = |of: &[usize]| of.iter().map(|image| image - self.images.start).collect();
        Relations {
            images: self.images.len(),
            first_image: self.images.start,
            first_text,
            image_of_text: own(&self.image_of_text),
            retrieved_image_of: own(&self.retrieved_image_of),
            retrieved_text_of: own(&self.retrieved_text_of),
            pairs: self
                .joint_image_of
                .iter()
                .zip(&self.joint_labels)
                .map(|(image, label)| (image - self.images.start, *label > 0.5))
                .collect(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_that_are_attracted_to_something_are_counted() {
        // The third and fourth picture of a step, with two captions and one; an image for picture 3, two texts for picture 2, and picture 2
        // read with a caption of its own and a false one.
        let members = Members {
            images: 2..4,
            image_of_text: vec![2, 2, 3],
            retrieved_image_of: vec![3],
            retrieved_text_of: vec![2, 2],
            joint_image_of: vec![2, 2],
            joint_labels: vec![1.0, 0.0],
            further: 0,
        };
        assert!(members.are_complete());
        assert_eq!((members.counts(), members.contrasted()), ([2, 3, 1, 2, 2, 0, 0], 2));
        let expected = Relations {
            images: 2,
            first_image: 2,
            first_text: 7,
            image_of_text: vec![0, 0, 1],
            retrieved_image_of: vec![1],
            retrieved_text_of: vec![0, 0],
            pairs: vec![(0, true), (0, false)],
        };
        assert_eq!(members.relations(7), expected);
        let of_another_rank = Members { retrieved_image_of: vec![4], ..members };
        assert!(!of_another_rank.are_complete());
        // Read with a false caption alone, a picture is attracted to nothing.
        let repelled = Members { images: 0..1, joint_image_of: vec![0], joint_labels: vec![0.0], ..Members::default() };
        assert_eq!(repelled.contrasted(), 0);
    }
}
