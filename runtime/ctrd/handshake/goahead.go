package handshake

import (
	"encoding/binary"
	"fmt"
	"io"
	"path/filepath"
	"strings"
)

// A go-ahead is a block of memory as execve takes it: strings, arrays of pointers
// to them, and a header that points to the arrays. The standby maps it at
// BlockAddress, so that the pointers are right as they come, and has nothing to
// take apart while nothing runs in the workspace. It begins with a magic and its
// own size: a block that is cut short, by the death of a daemon that was writing
// it, starts nothing.
const (
	// BlockMagic is the first word of a block.
	BlockMagic = 0x3244_4145_4841_4f47 // "GOAHEAD2"
	// BlockAddress is where the standby maps it: above this small program, which
	// lies below it on amd64 and arm64, and near enough to share its page tables,
	// since all of them are taken down before the command's first instruction.
	BlockAddress = 0x80_0000
	// MaxGoAhead bounds a block, well above the 2 MiB that execve takes.
	MaxGoAhead = 4 << 20

	// The header's words, by their offsets in bytes.
	BlockSize        = 8  // of the whole block, in bytes
	BlockArgv        = 16 // the command's arguments
	BlockEnvp        = 24 // and its environment
	BlockPaths       = 32 // where it may lie, in the order in which to look
	BlockHome        = 40 // the place in Envp of the HOME that the standby was given, or 0
	BlockExplainArgv = 48 // of the workspace-init that explains a failure
	BlockExplainEnvp = 56
	BlockErrno       = 64 // the two bytes in ExplainArgv that get the error number
	BlockHeader      = 72 // the header's size
)

// StandbyName is the name, args[0], under which workspace-init is a standby. Its only
// argument is its own path.
const StandbyName = "standby"

// Where a standby has the FIFOs.
const (
	GoAheadFD = 10
	ResultFD  = 11
)

// ExplainArg is workspace-init's first argument when a standby could not become
// the command, followed by the error number, or 0 where there was nothing to
// execute, and by the command.
const ExplainArg = "explain"

// GoAhead makes a standby the command. It holds secrets.
type GoAhead struct {
	// Argv are the command and its arguments. The command is looked for in Env's
	// PATH as execvp(3) does.
	Argv []string
	// Env is the whole environment, `KEY=value`. HOME is added when it is not
	// there, as the OCI runtime set it.
	Env []string
}

// WriteGoAhead writes the Block.
func WriteGoAhead(w io.Writer, g GoAhead) error {
	b, err := Block(g)
	if err == nil {
		_, err = w.Write(b)
	}
	return err
}

// Block returns the block, which is to be sent with a single write. ErrFormat is in the
// chain of its error about what can't be one: more than MaxGoAhead, no command, or a
// string with a byte that is zero.
func Block(g GoAhead) ([]byte, error) {
	if len(g.Argv) == 0 {
		return nil, fmt.Errorf("no command: %w", ErrFormat)
	}
	path, home := "", true
	for _, e := range g.Env {
		if v, ok := strings.CutPrefix(e, "PATH="); ok {
			path = v
		}
		if strings.HasPrefix(e, "HOME=") {
			home = false
		}
	}
	arrays := []struct {
		header  int // where the header points to it
		strings []string
	}{
		{BlockArgv, g.Argv},
		{BlockEnvp, g.Env},
		{BlockPaths, Paths(g.Argv[0], path)},
		{BlockExplainArgv, []string{InitPath, ExplainArg, "aa", g.Argv[0]}},
		{BlockExplainEnvp, []string{"PATH=" + path, "GOMAXPROCS=1"}},
	}
	const word, end = 8, 1 // an array's end is a word of 0
	pointers, size := BlockHeader, BlockHeader+word
	for _, a := range arrays {
		size += word * (len(a.strings) + end)
		for _, s := range a.strings {
			if strings.IndexByte(s, 0) >= 0 {
				return nil, fmt.Errorf("a string with a zero byte: %w", ErrFormat)
			}
			size += len(s) + 1
		}
	}
	if size > MaxGoAhead {
		return nil, fmt.Errorf("%d bytes, at most %d: %w", size, MaxGoAhead, ErrFormat)
	}

	b := make([]byte, size)
	put := func(at int, v uint64) { binary.LittleEndian.PutUint64(b[at:], v) }
	put(0, BlockMagic)
	put(BlockSize, uint64(size))
	texts := size
	for _, a := range arrays {
		put(a.header, BlockAddress+uint64(pointers))
		for i, s := range a.strings {
			texts -= len(s) + 1
			copy(b[texts:], s)
			put(pointers, BlockAddress+uint64(texts))
			pointers += word
			if a.header == BlockExplainArgv && i == 2 {
				put(BlockErrno, BlockAddress+uint64(texts))
			}
		}
		if a.header == BlockEnvp && home {
			put(BlockHome, BlockAddress+uint64(pointers))
			pointers += word // it is the end until HOME is put there
		}
		pointers += word * end
	}
	return b, nil
}

// Paths returns where the command may lie: itself if it has a slash, else one file
// in each directory of PATH.
func Paths(command, path string) (paths []string) {
	if strings.Contains(command, "/") {
		return []string{command}
	}
	for _, dir := range filepath.SplitList(path) {
		if dir == "" {
			dir = "."
		}
		file := filepath.Join(dir, command)
		if !strings.HasPrefix(file, "/") {
			file = "./" + file
		}
		paths = append(paths, file)
	}
	return paths
}

// Errno returns the error number in the two letters of an explanation's argument;
// 255 stands for all above.
func Errno(letters string) (errno uint32, ok bool) {
	if len(letters) != 2 || letters[0] < 'a' || letters[0] > 'p' || letters[1] < 'a' || letters[1] > 'p' {
		return 0, false
	}
	return uint32(letters[0]-'a')<<4 | uint32(letters[1]-'a'), true
}
