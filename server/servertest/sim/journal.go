package sim

import (
	"bytes"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"time"
)

// marker is a part of every secret's value, and of nothing else: where it shows,
// a value has leaked.
const marker = "x5-very-secret-5x"

// journal is what happened, with the daemon's own log, in one order.
type journal struct {
	mu    sync.Mutex
	start time.Time
	text  bytes.Buffer
}

func newJournal() *journal { return &journal{start: time.Now()} }

// add writes a line. It must not contain a secret's value.
func (j *journal) add(format string, args ...any) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stamp()
	fmt.Fprintf(&j.text, format+"\n", args...)
}

// stamp begins a line with the bubble's time.
func (j *journal) stamp() { fmt.Fprintf(&j.text, "%12v  ", time.Since(j.start)) }

// Write takes a line of the daemon's log.
func (j *journal) Write(line []byte) (int, error) {
	j.mu.Lock()
	defer j.mu.Unlock()
	j.stamp()
	j.text.WriteString("    ")
	return j.text.Write(line)
}

// noise are attributes that make lines long: stamp has the time, and the others
// are always the same.
var noise = []string{
	slog.TimeKey, "protocol", "peer.address", "call_id", "grpc.component", "grpc.service", "grpc.method_type",
	"grpc.start_time", "grpc.time_ms", "grpc.request.deadline",
}

// logger is what the daemon logs to.
func (j *journal) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(j, &slog.HandlerOptions{
		Level: slog.LevelDebug,
		ReplaceAttr: func(groups []string, a slog.Attr) slog.Attr {
			switch {
			case len(groups) > 0:
			case slices.Contains(noise, a.Key):
				return slog.Attr{}
			case a.Key == "stack":
				return slog.String(a.Key, shortStack(a.Value.String()))
			}
			return a
		},
	}))
}

// shortStack keeps the functions of this module.
func shortStack(stack string) string {
	var own []string
	for line := range strings.Lines(stack) {
		if strings.HasPrefix(line, "github.com/workspaced/") {
			name, _, _ := strings.Cut(line[strings.LastIndex(line, "/")+1:], "(0x")
			own = append(own, strings.TrimSpace(name))
		}
	}
	return strings.Join(own, " < ")
}

func (j *journal) String() string {
	j.mu.Lock()
	defer j.mu.Unlock()
	return j.text.String()
}

// leaks returns the lines in which a secret's value shows.
func (j *journal) leaks() (lines []string) {
	j.mu.Lock()
	defer j.mu.Unlock()
	if !bytes.Contains(j.text.Bytes(), []byte(marker)) {
		return nil
	}
	for line := range strings.Lines(j.text.String()) {
		if strings.Contains(line, marker) {
			lines = append(lines, line)
		}
	}
	return lines
}
