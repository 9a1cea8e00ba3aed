//! Finding a picture by the name that another file calls it.

use std::collections::HashMap;
use std::sync::OnceLock;

/// Numbers of things by name.
#[derive(Debug, Default)]
pub struct Names {
    numbers: HashMap<String, usize>,
    /// By the last digits of the name, with whether it has nothing else; nothing where two names share them. Made when it is first
    /// asked for.
    by_digits: OnceLock<HashMap<u64, Option<(usize, bool)>>>,
}

/// The number that a name ends with.
fn last_number(name: &str) -> Option<u64> {
    let digits = name.len() - name.trim_end_matches(|c: char| c.is_ascii_digit()).len();
    name[name.len() - digits..].parse().ok()
}

fn is_number(name: &str) -> bool {
    !name.is_empty() && name.bytes().all(|byte| byte.is_ascii_digit())
}

impl Names {
    /// Gives a name its number; gives the number that it had before, if any, and then leaves it.
    pub fn insert(&mut self, name: String, number: usize) -> Option<usize> {
        self.by_digits = OnceLock::new();
        match self.numbers.entry(name) {
            std::collections::hash_map::Entry::Occupied(known) => Some(*known.get()),
            std::collections::hash_map::Entry::Vacant(place) => {
                place.insert(number);
                None
            }
        }
    }

    /// The number of exactly this name.
    #[must_use]
    pub fn exact(&self, name: &str) -> Option<usize> {
        self.numbers.get(name).copied()
    }

    /// The number of this name. Where one of two names is a number and the other ends with it, they are the same picture's, unless
    /// another ends so too: `42` and `COCO_val2014_000000000042`.
    #[must_use]
    pub fn find(&self, name: &str) -> Option<usize> {
        if let Some(number) = self.exact(name) {
            return Some(number);
        }
        let by_digits = self.by_digits.get_or_init(|| {
            let mut by_digits = HashMap::new();
            for (name, &number) in &self.numbers {
                if let Some(digits) = last_number(name) {
                    by_digits.entry(digits).and_modify(|found| *found = None).or_insert(Some((number, is_number(name))));
                }
            }
            by_digits
        });
        let (number, alone) = by_digits.get(&last_number(name)?).copied().flatten()?;
        (alone || is_number(name)).then_some(number)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_are_found_by_name_and_by_number() {
        let mut names = Names::default();
        for (number, name) in
            ["COCO_val2014_000000000042", "photo", "7", "scene-0012", "a-5", "b-05", "x_1234567"].into_iter().enumerate()
        {
            assert_eq!(names.insert(name.to_owned(), number), None);
        }
        assert_eq!(names.insert("photo".to_owned(), 9), Some(1));
        for (name, found) in [
            ("42", Some(0)),
            ("photo", Some(1)),
            ("7", Some(2)),
            ("12", Some(3)),
            ("13", None),
            ("000042", Some(0)),
            ("scene-0012", Some(3)),
            ("x", None),
            // Two end so.
            ("5", None),
            ("1234567", Some(6)),
            // A name for a number, but none for another name.
            ("COCO_train2014_000000000007", Some(2)),
            ("COCO_train2014_000000000042", None),
        ] {
            assert_eq!(names.find(name), found, "{name}");
        }
    }
}
