//! The cross-modal contrast (see [`crate::ops::cross_modal`]).

use candle_core::{Result, Shape};

use super::machine::{Address, Argument, Grid, Kernel, Machine, arguments};
use super::operator::{Input, Operator, Pass};
use crate::ops::Relations;

/// Kinds of scores.
const KINDS: usize = 5;

/// Inputs: the scores that there are, and the temperature. It is told who belongs to whom.
#[derive(Debug)]
pub(super) struct CrossModal {
    pub(super) factor: f32,
    /// Which of the scores there are.
    pub(super) there: [bool; KINDS],
}

impl CrossModal {
    /// What is told: a `Related` of the kernels.
    pub(super) fn words(relations: &Relations) -> Vec<u32> {
        let of_pairs: Vec<usize> = relations.pairs.iter().map(|(image, _)| *image).collect();
        let lists = [&relations.image_of_text, &relations.retrieved_image_of, &relations.retrieved_text_of, &of_pairs];
        let mut words = vec![relations.first_text as u32, relations.first_image as u32];
        for of in lists {
            let mut starts = vec![0; relations.images + 1];
            of.iter().for_each(|image| starts[image + 1] += 1);
            for image in 0..relations.images {
                starts[image + 1] += starts[image];
            }
            words.extend(starts);
        }
        for of in lists {
            // By image, and of one image in order.
            let mut places: Vec<u32> = (0..of.len() as u32).collect();
            places.sort_by_key(|&place| of[place as usize]);
            words.extend(places);
        }
        words.extend(relations.pairs.iter().map(|(_, fits)| u32::from(*fits)));
        words.extend([&relations.image_of_text, &relations.retrieved_text_of].into_iter().flatten().map(|&image| image as u32));
        words
    }

    /// All scores in their order; the temperature, and what is told.
    fn arranged<'a>(&self, inputs: &'a [Input]) -> Result<([Option<&'a Input>; KINDS], [&'a Input; 2])> {
        let [scores @ .., temperature, told] = inputs else { candle_core::bail!("{}: inputs are missing", Self::NAME) };
        let mut left = scores.iter();
        Ok((self.there.map(|there| if there { left.next() } else { None }), [temperature, told]))
    }

    /// As the kernels have them: images, and then all others.
    fn sizes([with_texts, with_images, of_images, of_texts, of_pairs]: [Option<&Input>; KINDS]) -> (usize, [usize; 6]) {
        let sizes = |of: Option<&Input>| of.map_or((0, 0), Input::matrix);
        let ((images, all_texts), (texts, all_images)) = (sizes(with_texts), sizes(with_images));
        (images, [all_texts, texts, all_images, sizes(of_images).0, sizes(of_texts).1, sizes(of_pairs).0])
    }
}

fn addresses(of: [Option<Address>; KINDS]) -> [Argument; KINDS] {
    of.map(|at| at.unwrap_or(Address::NULL).into())
}

impl Operator for CrossModal {
    const NAME: &'static str = "cross_modal";

    fn forward<M: Machine>(&self, machine: &M, inputs: &[Input]) -> Result<(M::Values, Shape)> {
        let (scores, [temperature, told]) = self.arranged(inputs)?;
        let (images, sizes) = Self::sizes(scores);
        let (values, total) = (machine.allocate(images)?, machine.allocate(1)?);
        let mut arguments = addresses(scores.map(|of| of.map(|of| of.at))).to_vec();
        arguments.extend(arguments![temperature.at, told.at, machine.at(&values)]);
        arguments.extend(sizes.map(|size| Argument::Word(size as u32)));
        machine.launch(Kernel("cross_modal", "cross_modal"), Grid::reducing(images), &arguments)?;
        let arguments = arguments![machine.at(&values), machine.at(&total), images as u32, self.factor];
        machine.launch(Kernel("rows", "total"), Grid::reducing(1), arguments)?;
        Ok((total, Shape::from(())))
    }

    fn backward<M: Machine>(&self, machine: &M, pass: &Pass) -> Result<Vec<Option<M::Values>>> {
        let (scores, [temperature, told]) = self.arranged(pass.inputs)?;
        let (images, sizes) = Self::sizes(scores);
        let mut by = Vec::new();
        for of in scores {
            by.push(of.map(|of| of.alike(machine)).transpose()?);
        }
        let (of_images, by_temperature) = (machine.allocate(images)?, machine.allocate(1)?);
        let mut arguments = addresses(scores.map(|of| of.map(|of| of.at))).to_vec();
        arguments.extend(arguments![temperature.at, told.at, pass.gradient.at]);
        arguments.extend(by.iter().map(|by| Argument::from(by.as_ref().map_or(Address::NULL, |by| machine.at(by)))));
        arguments.push(machine.at(&of_images).into());
        arguments.extend(sizes.map(|size| Argument::Word(size as u32)));
        arguments.push(self.factor.into());
        machine.launch(Kernel("cross_modal", "cross_modal_backward"), Grid::reducing(images), &arguments)?;
        let arguments = arguments![machine.at(&of_images), machine.at(&by_temperature), images as u32, 1f32];
        machine.launch(Kernel("rows", "total"), Grid::reducing(1), arguments)?;
        Ok(by.into_iter().flatten().chain([by_temperature]).map(Some).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Three images; the last one is alone.
    #[test]
    fn who_belongs_to_whom_is_listed_by_image() {
        let relations = Relations {
            images: 3,
            first_image: 7,
            first_text: 9,
            image_of_text: vec![1, 0, 1],
            retrieved_image_of: vec![1],
            retrieved_text_of: Vec::new(),
            pairs: vec![(1, false), (0, true)],
        };
        let starts = [[0, 1, 3, 3], [0, 0, 1, 1], [0; 4], [0, 1, 2, 2]].concat();
        let lists = [&[1, 0, 2][..], &[0], &[1, 0]].concat();
        assert_eq!(CrossModal::words(&relations), [&[9, 7][..], &starts, &lists, &[0, 1], &[1, 0, 1]].concat());
    }
}
