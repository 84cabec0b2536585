// Package handshake is the protocol between the containerd driver and
// workspace-init, the first process of a container, over two FIFOs. It imports
// nothing but the standard library, so that workspace-init stays tiny.
//
//	init                                 daemon
//	opens both FIFOs, checks the command
//	Ready or Failed            ------->
//	                                     ... until the switch ...
//	                           <-------  GoAhead: the environment
//	Executing                  ------->
//	execve: the FIFO closes    ------->  end of file: the command runs
//	or Failed                  ------->  why it does not
//
// Each message is one frame: a magic, a version, the payload's length and its
// SHA-256. A frame that is cut short is never taken for a message: a daemon that
// dies while it writes the go-ahead starts nothing.
package handshake

import (
	"crypto/sha256"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
)

// Where init finds what it needs, in the container.
const (
	// InitPath is workspace-init.
	InitPath = "/run/workspaced-init"
	// Dir holds the FIFOs.
	Dir = "/run/workspaced"
	// GoAheadName and ResultName are the FIFOs' names in Dir.
	GoAheadName = "go"
	ResultName  = "result"
)

// Exit codes of workspace-init when it does not become the command.
const (
	ExitUsage    = 120 // its arguments or FIFOs are wrong
	ExitNoDaemon = 121 // the daemon went away before a whole go-ahead was read
	ExitRefused  = 122 // a check or execve failed; the result FIFO says why
)

const (
	version = 1
	// MaxGoAhead bounds a go-ahead's payload, well above the 2 MiB that execve takes.
	MaxGoAhead = 4 << 20
	maxResult  = 2048 // a result and its header must fit PIPE_BUF, to be written at once
	headerSize = 4 + 1 + 4 + sha256.Size
)

var (
	magicGoAhead = [4]byte{'W', 'S', 'G', 'O'}
	magicResult  = [4]byte{'W', 'S', 'R', 'S'}
)

// ErrFormat is in the chain of every error about a frame that is no message.
var ErrFormat = errors.New("not a handshake message")

// GoAhead makes a standby init the command. It holds secrets.
type GoAhead struct {
	// Env is the whole environment, `KEY=value`. Init adds HOME when it is not
	// there, as the OCI runtime set it.
	Env []string
}

// Kind says what a Result reports.
type Kind byte

// The kinds of results.
const (
	Ready     Kind = iota + 1 // every check passed, init waits for the go-ahead
	Executing                 // the next thing init does is execve
	Failed                    // a check or execve failed, init exits
)

// Cause classifies a failure.
type Cause byte

// The causes of failures.
const (
	CauseNone          Cause = iota
	CauseNotFound            // the command does not exist
	CauseNotExecutable       // the user may not execute it
	CauseFormat              // it is made for another machine, or no program
	CauseWorkingDir          // the working directory does not exist
	CauseExec                // execve failed
)

// Result is what init reports.
type Result struct {
	Kind  Kind
	Cause Cause
	// Errno is the system's error number, or 0.
	Errno uint32
	// Message says in words what failed. It holds no environment value.
	Message string
}

// WriteGoAhead writes the message as one frame.
func WriteGoAhead(w io.Writer, g GoAhead) error {
	size := 4
	for _, e := range g.Env {
		size += 4 + len(e)
	}
	if size > MaxGoAhead {
		return fmt.Errorf("go-ahead of %d bytes: %w", size, ErrFormat)
	}
	payload := make([]byte, 0, size)
	payload = binary.BigEndian.AppendUint32(payload, uint32(len(g.Env)))
	for _, e := range g.Env {
		payload = binary.BigEndian.AppendUint32(payload, uint32(len(e)))
		payload = append(payload, e...)
	}
	return writeFrame(w, magicGoAhead, payload)
}

// ReadGoAhead reads one frame. The error is io.EOF when nothing came before the
// end, io.ErrUnexpectedEOF when a part came.
func ReadGoAhead(r io.Reader) (GoAhead, error) {
	payload, err := readFrame(r, magicGoAhead, MaxGoAhead)
	if err != nil {
		return GoAhead{}, err
	}
	count, rest, ok := takeUint32(payload)
	// Each string takes 4 bytes at least: a count that can't be allocates nothing.
	if !ok || int64(count) > int64(len(rest))/4 {
		return GoAhead{}, fmt.Errorf("count of strings: %w", ErrFormat)
	}
	g := GoAhead{Env: make([]string, 0, count)}
	for range count {
		var n uint32
		if n, rest, ok = takeUint32(rest); !ok || int64(n) > int64(len(rest)) {
			return GoAhead{}, fmt.Errorf("length of a string: %w", ErrFormat)
		}
		g.Env = append(g.Env, string(rest[:n]))
		rest = rest[n:]
	}
	if len(rest) != 0 {
		return GoAhead{}, fmt.Errorf("bytes after the last string: %w", ErrFormat)
	}
	return g, nil
}

// WriteResult writes the result as one frame with a single write. A message
// that is too long is cut.
func WriteResult(w io.Writer, res Result) error {
	if n := maxResult - 6; len(res.Message) > n {
		res.Message = res.Message[:n]
	}
	payload := []byte{byte(res.Kind), byte(res.Cause)}
	payload = binary.BigEndian.AppendUint32(payload, res.Errno)
	payload = append(payload, res.Message...)
	return writeFrame(w, magicResult, payload)
}

// ReadResult reads one frame; its errors are those of ReadGoAhead.
func ReadResult(r io.Reader) (Result, error) {
	payload, err := readFrame(r, magicResult, maxResult)
	if err != nil {
		return Result{}, err
	}
	if len(payload) < 6 {
		return Result{}, fmt.Errorf("result of %d bytes: %w", len(payload), ErrFormat)
	}
	res := Result{
		Kind:    Kind(payload[0]),
		Cause:   Cause(payload[1]),
		Errno:   binary.BigEndian.Uint32(payload[2:6]),
		Message: string(payload[6:]),
	}
	if res.Kind < Ready || res.Kind > Failed || res.Cause > CauseExec {
		return Result{}, fmt.Errorf("result of kind %d, cause %d: %w", res.Kind, res.Cause, ErrFormat)
	}
	return res, nil
}

func writeFrame(w io.Writer, magic [4]byte, payload []byte) error {
	frame := make([]byte, 0, headerSize+len(payload))
	frame = append(frame, magic[:]...)
	frame = append(frame, version)
	frame = binary.BigEndian.AppendUint32(frame, uint32(len(payload)))
	sum := sha256.Sum256(payload)
	frame = append(frame, sum[:]...)
	frame = append(frame, payload...)
	_, err := w.Write(frame)
	return err
}

func readFrame(r io.Reader, magic [4]byte, limit uint32) ([]byte, error) {
	var header [headerSize]byte
	if _, err := io.ReadFull(r, header[:]); err != nil {
		return nil, err
	}
	if [4]byte(header[:4]) != magic {
		return nil, fmt.Errorf("magic: %w", ErrFormat)
	}
	if header[4] != version {
		return nil, fmt.Errorf("version %d, want %d: %w", header[4], version, ErrFormat)
	}
	size := binary.BigEndian.Uint32(header[5:9])
	if size > limit {
		return nil, fmt.Errorf("%d bytes, at most %d: %w", size, limit, ErrFormat)
	}
	payload := make([]byte, size)
	if _, err := io.ReadFull(r, payload); err != nil {
		if errors.Is(err, io.EOF) {
			err = io.ErrUnexpectedEOF
		}
		return nil, err
	}
	if sha256.Sum256(payload) != [sha256.Size]byte(header[9:]) {
		return nil, fmt.Errorf("checksum: %w", ErrFormat)
	}
	return payload, nil
}

func takeUint32(b []byte) (uint32, []byte, bool) {
	if len(b) < 4 {
		return 0, nil, false
	}
	return binary.BigEndian.Uint32(b), b[4:], true
}
