//! What a corpus holds of one picture: cells of the backbone's grid, or detected regions.

use half::f16;

/// One picture in one view.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Record {
    /// Region features, row-major `[regions, region_feature]`; of a grid whose backbone is trained, what they are computed from.
    pub values: Vec<f32>,
    /// What a detector says of its regions besides; nothing for a grid.
    pub detected: Option<Detected>,
}

/// Places and classes of detected regions.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Detected {
    /// `[regions, 5]`: x1, y1, x2, y2 and the area, in shares of the picture.
    pub boxes: Vec<f32>,
    /// Soft labels, `[regions, region_classes]`, in as many bits as a cache keeps: few are ever looked at.
    pub probabilities: Vec<f16>,
}

impl Record {
    /// That of a grid.
    #[must_use]
    pub fn grid(values: Vec<f32>) -> Self {
        Self { values, detected: None }
    }

    /// Boxes of detected regions, `[regions, 5]`; nothing for a grid, whose cells are where they are.
    #[must_use]
    pub fn boxes(&self) -> Option<&[f32]> {
        self.detected.as_ref().map(|detected| detected.boxes.as_slice())
    }
}

/// Numbers of the records, those with equally many values together, at most `most` in a group: what one dense batch can hold.
#[must_use]
pub fn alike(records: &[Record], most: usize) -> Vec<Vec<usize>> {
    let mut by_size = std::collections::BTreeMap::<usize, Vec<usize>>::new();
    for (number, record) in records.iter().enumerate() {
        by_size.entry(record.values.len()).or_default().push(number);
    }
    by_size.values().flat_map(|group| group.chunks(most.max(1)).map(<[usize]>::to_vec)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_of_one_size_come_together_and_none_is_lost() {
        let records = [3, 1, 3, 3, 1].map(|n| Record::grid(vec![0.0; n]));
        assert_eq!(alike(&records, 2), [vec![1, 4], vec![0, 2], vec![3]]);
    }
}
