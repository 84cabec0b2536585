package linear

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"time"
)

// Entry is an operation that has ended. It took effect, if it did, at one moment
// from Call to Return, in the history's time.
type Entry struct {
	Client int
	Op     Op
	Result Result
	// Call and Return are of History.Now or History.At.
	Call, Return int64
}

func (e Entry) String() string {
	end := "..."
	if e.Return != math.MaxInt64 {
		end = fmt.Sprint(e.Return)
	}
	return fmt.Sprintf("[%d, %s] client %d: %s -> %s", e.Call, end, e.Client, e.Op, e.Result.describe(e.Op.Kind))
}

// History is what happened, recorded by many goroutines at once.
type History struct {
	start time.Time

	mu      sync.Mutex
	last    int64
	entries []Entry
	unknown []int            // entries that have no Return yet
	acked   map[string]int64 // the newest generation that anybody was told of, by workspace
}

// NewHistory returns an empty history. Its time begins now.
func NewHistory() *History {
	return &History{start: time.Now(), acked: make(map[string]int64)}
}

// Now returns the history's time: nanoseconds since its beginning, and greater
// than what was returned before, so that it also orders what happens in a bubble
// of testing/synctest, where no time passes.
func (h *History) Now() int64 {
	h.mu.Lock()
	defer h.mu.Unlock()
	return h.now()
}

func (h *History) now() int64 {
	h.last = max(h.last+1, int64(time.Since(h.start)))
	return h.last
}

// At returns the history's time of t, a time of this machine's clock.
func (h *History) At(t time.Time) int64 { return int64(t.Sub(h.start)) }

// Call is an operation that was begun.
type Call struct {
	history *History
	entry   Entry
}

// Begin begins an operation; End or Drop of the Call that it returns ends it.
// client is any number; operations of one client need not come one after
// another.
func (h *History) Begin(client int, op Op) *Call {
	h.mu.Lock()
	defer h.mu.Unlock()
	if op.Kind == Wait && op.Generation == 0 {
		// Those that anybody knows of exist by now.
		op.Generation = h.acked[op.Workspace]
	}
	return &Call{h, Entry{Client: client, Op: op, Call: h.now()}}
}

// End ends an operation with its result.
func (c *Call) End(r Result) {
	h := c.history
	h.mu.Lock()
	defer h.mu.Unlock()
	c.entry.Result = r
	c.entry.Return = h.now()
	h.add(c.entry)
}

// Drop ends an operation that changed nothing and of which nothing was learned.
func (c *Call) Drop() {}

// Record adds an operation whose times the caller knows.
func (h *History) Record(e Entry) {
	h.mu.Lock()
	defer h.mu.Unlock()
	h.add(e)
}

func (h *History) add(e Entry) {
	if e.Result.Outcome == Unknown {
		if !e.Op.Kind.changes() {
			return // it tells nothing
		}
		e.Return = math.MaxInt64
		h.unknown = append(h.unknown, len(h.entries))
	} else if e.Op.Workspace != "" && e.Op.Kind != Launch {
		h.acked[e.Op.Workspace] = max(h.acked[e.Op.Workspace], e.Result.Generation)
	}
	h.entries = append(h.entries, e)
}

// Barrier says that no call that has ended with an unknown outcome can take
// effect any more: the daemon that it was sent to is gone, or has come to rest.
func (h *History) Barrier() {
	h.mu.Lock()
	defer h.mu.Unlock()
	now := h.now()
	for _, i := range h.unknown {
		h.entries[i].Return = now
	}
	h.unknown = nil
}

// Entries returns what was recorded, in the order of the calls.
func (h *History) Entries() []Entry {
	h.mu.Lock()
	defer h.mu.Unlock()
	entries := slices.Clone(h.entries)
	slices.SortFunc(entries, func(a, b Entry) int {
		if a.Call < b.Call {
			return -1
		}
		return 1
	})
	return entries
}

// String lists the entries, a line each.
func (h *History) String() string {
	var b strings.Builder
	for _, e := range h.Entries() {
		fmt.Fprintln(&b, e)
	}
	return b.String()
}
