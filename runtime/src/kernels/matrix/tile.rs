//! Some rows that are worked on together.

/// The innermost loop of a product: its number of rows is known when it is compiled, so that their sums stay in registers.
pub(super) trait Tile {
    /// Works on the `ROWS` rows from `row` on.
    fn run<const ROWS: usize>(&mut self, row: usize);
}

/// The most rows that are worked on together.
pub(super) const MOST_ROWS: usize = 12;

/// Runs a tile on all rows, `most` at once as long as there are so many; no more than [`MOST_ROWS`].
#[inline(always)]
pub(super) fn for_rows(most: usize, rows: usize, tile: &mut impl Tile) {
    let mut row = 0;
    while row < rows {
        let count = (rows - row).min(most);
        match count {
            1 => tile.run::<1>(row),
            2 => tile.run::<2>(row),
            3 => tile.run::<3>(row),
            4 => tile.run::<4>(row),
            5 => tile.run::<5>(row),
            6 => tile.run::<6>(row),
            7 => tile.run::<7>(row),
            8 => tile.run::<8>(row),
            9 => tile.run::<9>(row),
            10 => tile.run::<10>(row),
            11 => tile.run::<11>(row),
            _ => tile.run::<MOST_ROWS>(row),
        }
        row += count;
    }
}

/// Lays rows out for [`for_rows`]: the values of those that are worked on together side by side. Rows from `row` on begin at
/// `row · length`.
pub(super) fn pack<'a, T: Copy + Default + 'a>(
    rows: usize,
    most: usize,
    length: usize,
    row: impl Fn(usize) -> &'a [T],
) -> Vec<T> {
    let mut packed = vec![T::default(); rows * length];
    for first in (0..rows).step_by(most) {
        let count = most.min(rows - first);
        let tile = &mut packed[first * length..][..count * length];
        for place in 0..count {
            for (to, from) in tile.iter_mut().skip(place).step_by(count).zip(row(first + place)) {
                *to = *from;
            }
        }
    }
    packed
}
