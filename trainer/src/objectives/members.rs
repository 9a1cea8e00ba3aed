//! Who belongs to whom in a step's contrasts.

use std::ops::Range;

use serde::{Deserialize, Serialize};

use super::chunk::KINDS;
use super::contrastive::Contrast;

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

    /// Number of [`Members::contrasts`].
    pub fn contrasted(&self) -> usize {
        let mut attracted = vec![false; self.images.len()];
        let joint = self.joint_image_of.iter().zip(&self.joint_labels).filter(|(_, label)| **label > 0.5);
        for image in self.image_of_text.iter().chain(&self.retrieved_text_of).chain(joint.map(|(image, _)| image)) {
            attracted[image - self.images.start] = true;
        }
        attracted.into_iter().filter(|attracted| *attracted).count()
    }

    /// The contrast of each of this rank's pictures that has something to be attracted to (arXiv 2012.15409, equation 1). Positives:
    /// its captions, encoded alone and jointly; the images retrieved for it with its captions; it with the texts retrieved for it.
    /// Negatives: rewritten and neighbouring captions encoded with it; the step's other captions with it, and its captions with the
    /// step's other pictures. What was retrieved for others counts neither way: it may well fit this picture too.
    ///
    /// Places are those of [`Comparison::cross_modal`](super::comparison::Comparison), whose scores are, one after the other: of each
    /// picture the sum over all captions, of each caption the sum over all other pictures, of each caption the score with its own, of
    /// each retrieved image those with all captions, of each picture those with all retrieved texts, and of each pair encoded jointly.
    /// All of them are this rank's.
    pub fn contrasts(&self) -> Vec<Contrast> {
        let (images, texts) = (self.images.len(), self.image_of_text.len());
        let others = images;
        let own = others + texts;
        let of_retrieved_images = own + texts;
        let of_retrieved_texts = of_retrieved_images + self.retrieved_image_of.len() * texts;
        let of_joint = of_retrieved_texts + images * self.retrieved_text_of.len();
        let of_image = |place: usize| {
            let image = self.images.start + place;
            let mut positives = Vec::new();
            let mut all = vec![place];
            for text in numbered(&self.image_of_text, image) {
                all.push(others + text);
                positives.push(own + text);
            }
            let mut found = Vec::new();
            for retrieved in numbered(&self.retrieved_image_of, image) {
                found.extend(numbered(&self.image_of_text, image).map(|text| of_retrieved_images + retrieved * texts + text));
            }
            let row = of_retrieved_texts + place * self.retrieved_text_of.len();
            found.extend(numbered(&self.retrieved_text_of, image).map(|retrieved| row + retrieved));
            let joint: Vec<usize> = numbered(&self.joint_image_of, image).collect();
            positives.extend(&found);
            positives.extend(joint.iter().filter(|&&pair| self.joint_labels[pair] > 0.5).map(|pair| of_joint + pair));
            all.extend(found);
            all.extend(joint.iter().map(|pair| of_joint + pair));
            Contrast { positives, all }
        };
        (0..images).map(of_image).filter(|contrast| !contrast.positives.is_empty()).collect()
    }
}

/// Places at which `of` holds a number.
fn numbered(of: &[usize], number: usize) -> impl Iterator<Item = usize> + '_ {
    of.iter().enumerate().filter(move |(_, other)| **other == number).map(|(place, _)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_and_what_was_retrieved_are_positives() {
        // The third and fourth picture of a step, with two captions and one. Scores: 0, 1 each picture with all captions; 2, 3, 4 each
        // caption with other pictures; 5, 6, 7 with its own.
        let mut members = Members { images: 2..4, image_of_text: vec![2, 2, 3], ..Members::default() };
        let listed = |members: &Members| -> Vec<[Vec<usize>; 2]> {
            let contrasts = members.contrasts();
            assert_eq!(contrasts.len(), members.contrasted());
            contrasts.into_iter().map(|contrast| [contrast.positives, contrast.all]).collect()
        };
        assert_eq!(listed(&members), [[vec![5, 6], vec![0, 2, 3]], [vec![7], vec![1, 4]]]);
        // An image for picture 3 (8, 9, 10 with the captions), two texts for picture 2 (11, 12 with picture 2; 13, 14 with picture
        // 3), and picture 2 read with a caption of its own (15) and a false one (16).
        members.retrieved_image_of = vec![3];
        members.retrieved_text_of = vec![2, 2];
        members.joint_image_of = vec![2, 2];
        members.joint_labels = vec![1.0, 0.0];
        assert!(members.are_complete());
        let expected = [[vec![5, 6, 11, 12, 15], vec![0, 2, 3, 11, 12, 15, 16]], [vec![7, 10], vec![1, 4, 10]]];
        assert_eq!(listed(&members), expected);
        assert_eq!(members.counts(), [2, 3, 1, 2, 2, 0, 0]);
        let of_another_rank = Members { retrieved_image_of: vec![4], ..members.clone() };
        assert!(!of_another_rank.are_complete());
        // Read with a false caption alone, a picture is attracted to nothing.
        let repelled = Members { images: 0..1, joint_image_of: vec![0], joint_labels: vec![0.0], ..Members::default() };
        assert_eq!(listed(&repelled), Vec::<[Vec<usize>; 2]>::new());
    }
}
