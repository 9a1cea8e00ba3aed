//! ONNX files as rten reads them: it takes lists in attributes and the sizes of tensors only value by value, where other
//! programs also take them packed, as the exporter writes them; and weights only from files whose names end in `.data`.

use anyhow::{Context, bail};

/// The messages of `onnx.proto` that hold such lists, or hold messages that do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Message {
    Model,
    Graph,
    Node,
    Attribute,
    Tensor,
    /// A name and a value, of what is said of external data.
    Entry,
}

/// What a field of several bytes holds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Content {
    Message(Message),
    Integers,
    Floats,
    /// Where external data is, or another value of an entry.
    Location,
    Bytes,
}

impl Message {
    fn content(self, field: u64) -> Content {
        match (self, field) {
            (Self::Model, 7) | (Self::Attribute, 6) => Content::Message(Self::Graph),
            (Self::Graph, 1) => Content::Message(Self::Node),
            (Self::Node, 5) => Content::Message(Self::Attribute),
            (Self::Graph | Self::Attribute, 5) => Content::Message(Self::Tensor),
            (Self::Attribute, 8) | (Self::Tensor, 1) => Content::Integers,
            (Self::Attribute, 7) => Content::Floats,
            (Self::Tensor, 13) => Content::Message(Self::Entry),
            (Self::Entry, 2) => Content::Location,
            _ => Content::Bytes,
        }
    }
}

/// Where the bundle's graphs say that their weights are, and where they are said to be in what [`unpacked`] gives.
pub const WEIGHTS: [&str; 2] = ["weights.bin", "weights.data"];

/// A model with the same content and no packed lists where rten takes none.
pub fn unpacked(model: &[u8]) -> anyhow::Result<Vec<u8>> {
    rewrite(model, Message::Model).context("not an ONNX file")
}

fn rewrite(mut bytes: &[u8], message: Message) -> anyhow::Result<Vec<u8>> {
    let mut out = Vec::with_capacity(bytes.len());
    while !bytes.is_empty() {
        let tag = varint(&mut bytes)?;
        let field = tag >> 3;
        match tag & 7 {
            0 => {
                put(&mut out, tag);
                put(&mut out, varint(&mut bytes)?);
            }
            kind @ (1 | 5) => {
                put(&mut out, tag);
                out.extend_from_slice(take(&mut bytes, if kind == 1 { 8 } else { 4 })?);
            }
            2 => {
                let length = usize::try_from(varint(&mut bytes)?)?;
                let mut inner = take(&mut bytes, length)?;
                match message.content(field) {
                    Content::Integers => {
                        while !inner.is_empty() {
                            put(&mut out, field << 3);
                            put(&mut out, varint(&mut inner)?);
                        }
                    }
                    Content::Floats => {
                        while !inner.is_empty() {
                            put(&mut out, field << 3 | 5);
                            out.extend_from_slice(take(&mut inner, 4)?);
                        }
                    }
                    Content::Message(message) => {
                        let inner = rewrite(inner, message)?;
                        put(&mut out, tag);
                        put(&mut out, inner.len() as u64);
                        out.extend_from_slice(&inner);
                    }
                    Content::Location | Content::Bytes => {
                        let renamed = message.content(field) == Content::Location && inner == WEIGHTS[0].as_bytes();
                        let inner = if renamed { WEIGHTS[1].as_bytes() } else { inner };
                        put(&mut out, tag);
                        put(&mut out, inner.len() as u64);
                        out.extend_from_slice(inner);
                    }
                }
            }
            kind => bail!("a field of kind {kind}"),
        }
    }
    Ok(out)
}

fn varint(bytes: &mut &[u8]) -> anyhow::Result<u64> {
    let mut value = 0;
    for shift in (0..64).step_by(7) {
        let byte = take(bytes, 1)?[0];
        value |= u64::from(byte & 0x7f) << shift;
        if byte < 0x80 {
            return Ok(value);
        }
    }
    bail!("a number of more than 64 bits")
}

fn put(out: &mut Vec<u8>, mut value: u64) {
    while value >= 0x80 {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

fn take<'a>(bytes: &mut &'a [u8], length: usize) -> anyhow::Result<&'a [u8]> {
    let (taken, rest) = bytes.split_at_checked(length).context("it ends too early")?;
    *bytes = rest;
    Ok(taken)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lists_are_taken_apart_and_all_else_is_kept() {
        // Model { ir_version: 8, graph: { node: { op_type: "C", attribute: { ints: [1, 300], floats: [1.0], type: 7 } },
        // initializer: { dims: [2], raw_data: [9] } } }
        let attribute = [0x42, 3, 1, 0xac, 2, 0x3a, 4, 0, 0, 0x80, 0x3f, 0xa0, 1, 7];
        let node = [&[0x22, 1, b'C', 0x2a, 14][..], &attribute].concat();
        let graph = [&[0x0a, node.len() as u8][..], &node, &[0x2a, 6, 0x0a, 1, 2, 0x4a, 1, 9]].concat();
        let model = [&[8, 8, 0x3a, graph.len() as u8][..], &graph].concat();

        let attribute = [0x40, 1, 0x40, 0xac, 2, 0x3d, 0, 0, 0x80, 0x3f, 0xa0, 1, 7];
        let node = [&[0x22, 1, b'C', 0x2a, 13][..], &attribute].concat();
        let graph = [&[0x0a, node.len() as u8][..], &node, &[0x2a, 5, 8, 2, 0x4a, 1, 9]].concat();
        let expected = [&[8, 8, 0x3a, graph.len() as u8][..], &graph].concat();
        assert_eq!(unpacked(&model).unwrap(), expected);
        assert_eq!(unpacked(&expected).unwrap(), expected);
        for cut in 1..model.len() {
            assert!(cut == 2 || unpacked(&model[..cut]).is_err(), "{cut}");
        }
    }

    #[test]
    fn weights_get_the_name_that_is_taken() {
        // Model { graph: { initializer: { external_data: { key: "location", value: … } } } }
        let model = |value: &str| {
            let entry = [&[0x0a, 8][..], b"location", &[0x12, value.len() as u8], value.as_bytes()].concat();
            let tensor = [&[0x6a, entry.len() as u8][..], &entry].concat();
            let graph = [&[0x2a, tensor.len() as u8][..], &tensor].concat();
            [&[0x3a, graph.len() as u8][..], &graph].concat()
        };
        assert_eq!(unpacked(&model("weights.bin")).unwrap(), model("weights.data"));
        assert_eq!(unpacked(&model("other.bin")).unwrap(), model("other.bin"));
    }
}
