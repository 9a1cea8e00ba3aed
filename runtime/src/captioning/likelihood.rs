//! How likely a model is to write a text that is given.

use super::beam::{Branch, LanguageModel};
use crate::lanes::log_sum_exp;
use crate::tokenizer::{CLS, SEP};

/// Natural logarithm of the probability that a model writes just these ids and then `[SEP]`; negative infinity for an id that it
/// does not know.
///
/// # Errors
/// Those of the model.
pub fn log_likelihood<M: LanguageModel>(model: &mut M, tokens: &[u32]) -> Result<f32, M::Error> {
    let mut sum = 0.0;
    for (&read, &next) in [CLS].iter().chain(tokens).zip(tokens.iter().chain(&[SEP])) {
        let logits = model.read(&[Branch { parent: 0, id: read }])?;
        sum += logits.get(next as usize).map_or(f32::NEG_INFINITY, |logit| logit - log_sum_exp(&logits));
    }
    Ok(sum)
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// After `n` ids, the last of them `id`, the weights of 0, 1, … are `(id + n + 1), (id + n + 2), …`.
    struct Toy {
        read: Vec<u32>,
    }

    impl LanguageModel for Toy {
        type Error = Infallible;

        fn read(&mut self, branches: &[Branch]) -> Result<Vec<f32>, Infallible> {
            assert!(branches.len() == 1 && branches[0].parent == 0);
            self.read.push(branches[0].id);
            Ok((0..6).map(|i| (self.read.len() as f32 + (branches[0].id + i) as f32).ln()).collect())
        }

        fn is_forbidden(&self, _: u32) -> bool {
            false
        }
    }

    #[test]
    fn a_texts_probability_is_the_product_of_its_ids_and_of_its_end() {
        let mut toy = Toy { read: Vec::new() };
        let found = log_likelihood(&mut toy, &[4, 0]).unwrap();
        assert_eq!(toy.read, [CLS, 4, 0]);
        // Of the six weights from `first` on, that of `id`.
        let share = |first: u32, id: u32| f64::from(first + id) / f64::from(6 * first + 15);
        let expected = (share(CLS + 1, 4) * share(4 + 2, 0) * share(3, SEP)).ln();
        // Sums of six terms in f32, three times.
        assert!((f64::from(found) - expected).abs() < 1e-5, "{found} {expected}");
        assert_eq!(log_likelihood(&mut Toy { read: Vec::new() }, &[99]).unwrap(), f32::NEG_INFINITY);
    }
}
