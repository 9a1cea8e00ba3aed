//! Arrays that lie here and there, copied into one tensor by one kernel.

use candle_core::{Result, Shape, Tensor};

use super::machine::{Address, Grid, Kernel, Machine, THREADS, arguments};

/// How arrays become tensors.
pub struct Gathering<M: Machine> {
    table: M::Words,
    pieces: usize,
    starts: Vec<usize>,
    values: usize,
}

impl<M: Machine> Gathering<M> {
    /// Of f32 arrays, each of so many values.
    pub fn of(machine: &M, arrays: &[(Address, usize)]) -> Result<Self> {
        let (words, pieces, starts, values) = pieces(arrays);
        Ok(Self { table: machine.upload(&words)?, pieces, starts, values })
    }

    /// A copy of what lies there now, in tensors of these shapes: parts of one.
    pub fn gathered<'a>(&self, machine: &M, shapes: impl IntoIterator<Item = &'a Shape>) -> Result<Vec<Tensor>> {
        if self.pieces == 0 {
            return Ok(Vec::new());
        }
        let all = machine.allocate(self.values)?;
        let grid = Grid { blocks: [self.pieces, 1, 1], threads: THREADS, shared: 0 };
        machine.launch(Kernel("rows", "gather_pieces"), grid, arguments![machine.words_at(&self.table), machine.at(&all)])?;
        let all = machine.tensor(all, &Shape::from(self.values))?;
        let of = |(shape, &start): (&Shape, &usize)| all.narrow(0, start, shape.elem_count())?.reshape(shape);
        shapes.into_iter().zip(&self.starts).map(of).collect()
    }
}

/// Of each piece, where it lies, where it goes to, and how long it is, in words for the kernel; the number of pieces, where each array
/// begins, and how many values there are in all.
fn pieces(arrays: &[(Address, usize)]) -> (Vec<u32>, usize, Vec<usize>, usize) {
    /// Values of a piece, what one block copies.
    const PIECE: usize = 1 << 12;
    let (mut words, mut count, mut starts, mut at) = (Vec::new(), 0, Vec::new(), 0usize);
    for &(from, values) in arrays {
        starts.push(at);
        for start in (0..values).step_by(PIECE) {
            let Address(address) = from.after(start);
            let piece = [address as u32, (address >> 32) as u32, (at + start) as u32, PIECE.min(values - start) as u32];
            words.extend(piece);
            count += 1;
        }
        // Each begins in a place of sixteen bytes.
        at += values.next_multiple_of(4);
    }
    (words, count, starts, at)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// 5,000 values in two pieces, then three that begin in a place of sixteen bytes.
    #[test]
    fn arrays_are_gathered_in_pieces() {
        let (words, count, starts, values) = pieces(&[(Address(0x1_0000_0010), 5_000), (Address(64), 3)]);
        let expected = [0x10, 1, 0, 4096, 0x10 + 4 * 4096, 1, 4096, 904, 64, 0, 5_000, 3];
        assert_eq!((words, count, starts, values), (expected.to_vec(), 3, vec![0, 5_000], 5_004));
    }
}
