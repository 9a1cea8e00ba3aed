//! Who belongs to whom in a step's cross-modal contrast.

use super::Contrast;

/// Whose scores a step's contrast compares. The vector of scores holds, one after the other, those of every picture with every
/// caption, of every retrieved image with every caption, of every picture with every retrieved text, and of the pairs encoded
/// jointly.
pub(super) struct Members {
    pub images: usize,
    pub image_of_text: Vec<usize>,
    pub retrieved_image_of: Vec<usize>,
    pub retrieved_text_of: Vec<usize>,
    pub joint_image_of: Vec<usize>,
    pub joint_labels: Vec<f32>,
}

impl Members {
    /// The contrast of every picture with captions (arXiv 2012.15409, equation 1). Positives: its captions, encoded alone and
    /// jointly; the images retrieved for it with its captions; it with the texts retrieved for it. Negatives: rewritten and
    /// neighbouring captions encoded with it; the step's other captions with it, and its captions with the step's other pictures.
    /// What was retrieved for others counts neither way: it may well fit this picture too.
    pub fn contrasts(&self) -> Vec<Contrast> {
        let texts = self.image_of_text.len();
        let of_retrieved_images = self.images * texts;
        let of_retrieved_texts = of_retrieved_images + self.retrieved_image_of.len() * texts;
        let of_joint = of_retrieved_texts + self.images * self.retrieved_text_of.len();
        let of_image = |image: usize| {
            let mut contrast = Contrast::default();
            for (text, &of) in self.image_of_text.iter().enumerate() {
                if of == image {
                    contrast.positives.push(image * texts + text);
                    contrast.negatives.extend((0..self.images).filter(|&other| other != image).map(|other| other * texts + text));
                    let found = self.retrieved_image_of.iter().enumerate().filter(|(_, of)| **of == image);
                    contrast.positives.extend(found.map(|(retrieved, _)| of_retrieved_images + retrieved * texts + text));
                } else {
                    contrast.negatives.push(image * texts + text);
                }
            }
            let found = self.retrieved_text_of.iter().enumerate().filter(|(_, of)| **of == image);
            let row = of_retrieved_texts + image * self.retrieved_text_of.len();
            contrast.positives.extend(found.map(|(retrieved, _)| row + retrieved));
            let joint = self.joint_image_of.iter().zip(&self.joint_labels).enumerate().filter(|(_, (of, _))| **of == image);
            for (joint, (_, &label)) in joint {
                let side = if label > 0.5 { &mut contrast.positives } else { &mut contrast.negatives };
                side.push(of_joint + joint);
            }
            contrast
        };
        (0..self.images).map(of_image).filter(|contrast| !contrast.positives.is_empty()).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn siblings_and_what_was_retrieved_are_positives_and_everything_else_is_against_them() {
        // Two pictures with two captions and one. Scores: 0, 1, 2 picture 0 with texts 0, 1, 2; 3, 4, 5 picture 1 with them.
        let mut members = Members {
            images: 2,
            image_of_text: vec![0, 0, 1],
            retrieved_image_of: Vec::new(),
            retrieved_text_of: Vec::new(),
            joint_image_of: Vec::new(),
            joint_labels: Vec::new(),
        };
        let sorted = |members: &Members| -> Vec<[Vec<usize>; 2]> {
            let contrasts = members.contrasts().into_iter();
            contrasts
                .map(|c| {
                    [c.positives, c.negatives].map(|mut v| {
                        v.sort_unstable();
                        v
                    })
                })
                .collect()
        };
        assert_eq!(sorted(&members), [[vec![0, 1], vec![2, 3, 4]], [vec![5], vec![2, 3, 4]]]);
        // An image for picture 1 (6, 7, 8 with the texts), two texts for picture 0 (9, 10 with picture 0; 11, 12 with picture 1),
        // and picture 0 read with a caption of its own (13) and a false one (14).
        members.retrieved_image_of = vec![1];
        members.retrieved_text_of = vec![0, 0];
        members.joint_image_of = vec![0, 0];
        members.joint_labels = vec![1.0, 0.0];
        assert_eq!(sorted(&members), [[vec![0, 1, 9, 10, 13], vec![2, 3, 4, 14]], [vec![5, 8], vec![2, 3, 4]]]);
    }
}
