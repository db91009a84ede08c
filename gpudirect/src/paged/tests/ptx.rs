//! An interpreter of the few instructions of PTX that the kernel is made of, so that its text is executed where there is no GPU.
//!
//! Strict on purpose: an unknown instruction, a register that was not declared or not written, an access that is not aligned or
//! not inside one allocation ends the test.

use std::collections::{BTreeMap, HashMap};

use super::super::Move;
use super::super::kernel::{self, ARGS, Launch, THREADS};

/// Global memory: allocations by address.
#[derive(Default)]
pub struct Memory(BTreeMap<u64, Vec<u8>>);

impl Memory {
    pub fn insert(&mut self, address: u64, bytes: Vec<u8>) {
        self.0.insert(address, bytes);
    }

    pub fn at(&self, address: u64) -> &[u8] {
        &self.0[&address]
    }

    fn range(&mut self, address: u64, len: usize) -> &mut [u8] {
        assert!(address.is_multiple_of(len as u64), "{len} bytes at {address:#x} are not aligned");
        let (start, bytes) = self.0.range_mut(..=address).next_back().expect("below all memory");
        let at = (address - start) as usize;
        bytes.get_mut(at..at + len).unwrap_or_else(|| panic!("{len} bytes at {address:#x} are outside"))
    }
}

#[derive(Clone, Copy, Debug)]
enum Operand {
    Register(usize),
    Value(u64),
    /// `%tid.x` and its like, by the place in the thread's list.
    Special(usize),
}

const SPECIAL: [&str; 5] = ["%ctaid.x", "%ctaid.y", "%nctaid.y", "%ntid.x", "%tid.x"];

#[derive(Debug)]
struct Instruction {
    /// Register, and the value that it must have.
    guard: Option<(usize, bool)>,
    op: String,
    /// Registers of a vector are listed one by one.
    operands: Vec<Operand>,
    offset: u64,
    target: usize,
}

struct Program {
    instructions: Vec<Instruction>,
    /// Bits of each register: 1 for predicates.
    bits: Vec<u32>,
}

fn parse(text: &str, entry: &str) -> Program {
    let start = text.find(&format!(".entry {entry}(")).expect("the entry");
    let body = &text[start + text[start..].find('{').unwrap() + 1..];
    let body = &body[..body.find("\nDONE:\nret;\n}").expect("its end") + "\nDONE:\nret;".len()];
    let mut names: HashMap<String, usize> = HashMap::new();
    let mut bits = Vec::new();
    let mut labels: HashMap<&str, usize> = HashMap::new();
    let mut lines = Vec::new();
    for line in body.lines().map(str::trim).filter(|line| !line.is_empty()) {
        if let Some(declared) = line.strip_prefix(".reg ") {
            let (kind, list) = declared.split_once(' ').unwrap();
            for name in list.trim_end_matches(';').split(", ") {
                let width =
                    if kind == ".pred" { 1 } else { kind.strip_prefix(".b").unwrap().parse().unwrap() };
                assert!(names.insert(name.to_owned(), bits.len()).is_none(), "{name} twice");
                bits.push(width);
            }
        } else if let Some(label) = line.strip_suffix(':') {
            labels.insert(label, lines.len());
        } else {
            lines.push(line.strip_suffix(';').expect("a semicolon"));
        }
    }
    let register = |name: &str| *names.get(name).unwrap_or_else(|| panic!("{name} is not declared"));
    let instructions = lines
        .iter()
        .map(|line| {
            let (guard, rest) = match line.strip_prefix('@') {
                Some(guarded) => {
                    let (name, rest) = guarded.split_once(' ').unwrap();
                    let wanted = !name.starts_with('!');
                    (Some((register(name.trim_start_matches('!')), wanted)), rest)
                }
                None => (None, *line),
            };
            let (op, list) = rest.split_once(' ').unwrap_or((rest, ""));
            let mut parsed =
                Instruction { guard, op: op.to_owned(), operands: Vec::new(), offset: 0, target: 0 };
            if op == "bra" {
                parsed.target = labels[list];
                return parsed;
            }
            for item in list.split(", ").filter(|item| !item.is_empty()) {
                let item = item.trim_matches(['{', '}']);
                let inner = item.strip_prefix('[').and_then(|inner| inner.strip_suffix(']'));
                let name = match inner.map(|inner| inner.split_once('+').unwrap_or((inner, "0"))) {
                    Some((name, offset)) => {
                        parsed.offset = offset.parse().unwrap();
                        name
                    }
                    None => item,
                };
                parsed.operands.push(match SPECIAL.iter().position(|special| *special == name) {
                    Some(special) => Operand::Special(special),
                    None if name == "args" => Operand::Value(0),
                    None if name.starts_with('%') => Operand::Register(register(name)),
                    None => Operand::Value(name.parse().unwrap()),
                });
            }
            parsed
        })
        .collect();
    Program { instructions, bits }
}

struct Thread<'a> {
    program: &'a Program,
    args: &'a [u8],
    special: [u64; SPECIAL.len()],
    registers: Vec<Option<u64>>,
}

impl Thread<'_> {
    fn get(&self, operand: Operand, bits: u32) -> u64 {
        match operand {
            Operand::Value(value) => value,
            Operand::Special(special) => self.special[special],
            Operand::Register(register) => {
                assert_eq!(self.program.bits[register], bits, "a register of another width");
                self.registers[register].expect("a register that was not written")
            }
        }
    }

    fn set(&mut self, operand: Operand, bits: u32, value: u64) {
        let Operand::Register(register) = operand else { panic!("writes to no register") };
        assert_eq!(self.program.bits[register], bits, "a register of another width");
        self.registers[register] = Some(if bits == 64 { value } else { value & ((1 << bits) - 1) });
    }

    fn run(&mut self, memory: &mut Memory) {
        let mut at = 0;
        for _ in 0..100_000 {
            let instruction = &self.program.instructions[at];
            at += 1;
            if let Some((register, wanted)) = instruction.guard
                && (self.get(Operand::Register(register), 1) == 1) != wanted
            {
                continue;
            }
            let Instruction { operands: o, offset, .. } = instruction;
            match instruction.op.as_str() {
                "ret" => return,
                "bra" => at = instruction.target,
                "mov.u32" => self.set(o[0], 32, self.get(o[1], 32)),
                "mov.u64" => self.set(o[0], 64, self.get(o[1], 64)),
                "cvt.u64.u32" => self.set(o[0], 64, self.get(o[1], 32)),
                "add.u32" => self.set(o[0], 32, self.get(o[1], 32) + self.get(o[2], 32)),
                "sub.u32" => self.set(o[0], 32, self.get(o[1], 32).wrapping_sub(self.get(o[2], 32))),
                "mul.lo.u32" => self.set(o[0], 32, self.get(o[1], 32) * self.get(o[2], 32)),
                "div.u32" => self.set(o[0], 32, self.get(o[1], 32) / self.get(o[2], 32)),
                "mul.wide.u32" => self.set(o[0], 64, self.get(o[1], 32) * self.get(o[2], 32)),
                "add.u64" => self.set(o[0], 64, self.get(o[1], 64).wrapping_add(self.get(o[2], 64))),
                "mul.lo.u64" => self.set(o[0], 64, self.get(o[1], 64).wrapping_mul(self.get(o[2], 64))),
                "mad.lo.u64" => {
                    let product = self.get(o[1], 64).wrapping_mul(self.get(o[2], 64));
                    self.set(o[0], 64, product.wrapping_add(self.get(o[3], 64)));
                }
                "setp.lt.u32" => self.set(o[0], 1, (self.get(o[1], 32) < self.get(o[2], 32)).into()),
                "setp.eq.u32" => self.set(o[0], 1, (self.get(o[1], 32) == self.get(o[2], 32)).into()),
                "setp.ne.u32" => self.set(o[0], 1, (self.get(o[1], 32) != self.get(o[2], 32)).into()),
                "selp.b64" => {
                    let from = if self.get(o[3], 1) == 1 { o[1] } else { o[2] };
                    self.set(o[0], 64, self.get(from, 64));
                }
                "ld.param.u32" | "ld.param.u64" => {
                    let len = if instruction.op.ends_with("64") { 8 } else { 4 };
                    let from = (self.get(o[1], 64) + offset) as usize;
                    assert!(from.is_multiple_of(len) && from + len <= ARGS);
                    let mut bytes = [0; 8];
                    bytes[..len].copy_from_slice(&self.args[from..from + len]);
                    self.set(o[0], len as u32 * 8, u64::from_le_bytes(bytes));
                }
                op => {
                    let (load, kind) = match (op.strip_prefix("ld.global."), op.strip_prefix("st.global.")) {
                        (Some(kind), _) => (true, kind),
                        (_, Some(kind)) => (false, kind),
                        _ => panic!("an unknown instruction: {op}"),
                    };
                    // Bytes of all, bytes of one, bits of its register.
                    let (len, one, bits) = match kind {
                        "v4.u32" => (16, 4, 32),
                        "u64" => (8, 8, 64),
                        "u32" => (4, 4, 32),
                        "u16" => (2, 2, 16),
                        "u8" => (1, 1, 16),
                        _ => panic!("an unknown access: {op}"),
                    };
                    let count = len / one;
                    let (place, registers) = match load {
                        true => (o[count], &o[..count]),
                        false => (o[0], &o[1..]),
                    };
                    assert_eq!(registers.len(), count, "{op}");
                    let range = memory.range(self.get(place, 64) + offset, len);
                    for (bytes, register) in range.chunks_mut(one).zip(registers) {
                        if load {
                            let mut value = [0; 8];
                            value[..one].copy_from_slice(bytes);
                            self.set(*register, bits, u64::from_le_bytes(value));
                        } else {
                            bytes.copy_from_slice(&self.get(*register, bits).to_le_bytes()[..one]);
                        }
                    }
                }
            }
        }
        panic!("a thread that does not end");
    }
}

/// Executes a move as a GPU would, one thread after the other. `parts`: groups that share a block, at most; with few of them each
/// thread goes round several times.
pub fn run(job: &Move, memory: &mut Memory, parts: u32) {
    let text = kernel::ptx();
    let program = parse(&text, &kernel::entry(job.width()));
    let launched = job.launches(&mut |Launch { args, grid }| -> Result<(), ()> {
        let grid = (grid.0, grid.1.min(parts));
        let bytes: Vec<u8> = args.iter().flat_map(|word| word.to_le_bytes()).collect();
        for (x, y) in (0..grid.0).flat_map(|x| (0..grid.1).map(move |y| (x, y))) {
            for tid in 0..THREADS {
                let special = [x, y, grid.1, THREADS, tid].map(u64::from);
                let registers = vec![None; program.bits.len()];
                Thread { program: &program, args: &bytes, special, registers }.run(memory);
            }
        }
        Ok(())
    });
    launched.unwrap();
}
