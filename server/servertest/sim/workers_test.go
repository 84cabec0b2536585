package sim

import (
	"bufio"
	"bytes"
	"encoding/json"
	"flag"
	"fmt"
	"os"
	"os/exec"
	goruntime "runtime"
	"runtime/debug"
	"strings"
	"sync"
	"testing"
	"time"
)

// Seeds are run by processes of their own, one for each core: what happens in a
// bubble depends least on chance when nothing else runs in its process, and a
// panic that ends the process is one seed's, whose number is known.

var workerFlag = flag.String("worker", "", "for the test itself: run these seeds, and report on file 3")

// share is what one worker runs: a seed, and every step-th after it, n of them
// (0: until the time is up).
type share struct {
	First, Step uint64
	N           int
	Until       time.Time
	Linear      bool
	Die         bool // in the first one: for TestWorkerDies
}

// message is what a worker says.
type message struct {
	Start  uint64  `json:",omitempty"` // it begins with this seed
	Report *Report `json:",omitempty"` // of all seeds since the last message
}

// hangLimit is how long one seed may take, by the clock on the wall.
const hangLimit = 2 * time.Minute

// runShares runs seeds in n processes, and returns what all of them found.
func runShares(t *testing.T, s share, n int) *Report {
	t.Helper()
	total := NewReport()
	var mu sync.Mutex
	var wg sync.WaitGroup
	for i := range n {
		mine := s
		mine.First, mine.Step = s.First+uint64(i), uint64(n)
		mine.N = (s.N + n - 1 - i) / n
		if s.N > 0 && mine.N == 0 {
			continue
		}
		wg.Go(func() {
			runWorker(t, mine, func(r *Report) {
				mu.Lock()
				defer mu.Unlock()
				total.Add(r)
			})
		})
	}
	wg.Wait()
	return total
}

// runWorker starts a process and takes its reports.
func runWorker(t *testing.T, s share, take func(*Report)) {
	text, err := json.Marshal(s)
	if err != nil {
		t.Error(err)
		return
	}
	ours, theirs, err := os.Pipe()
	if err != nil {
		t.Error(err)
		return
	}
	defer ours.Close()
	cmd := exec.CommandContext(t.Context(), os.Args[0], "-test.run=^TestWorker$", "-test.timeout=0", "-worker="+string(text))
	var output bytes.Buffer
	cmd.Stdout, cmd.Stderr, cmd.ExtraFiles = &output, &output, []*os.File{theirs}
	err = cmd.Start()
	_ = theirs.Close()
	if err != nil {
		t.Error(err)
		return
	}
	var last uint64
	decoder := json.NewDecoder(bufio.NewReader(ours))
	for {
		var m message
		if decoder.Decode(&m) != nil {
			break
		}
		last = max(last, m.Start)
		if m.Report != nil {
			take(m.Report)
		}
	}
	if err := cmd.Wait(); err != nil {
		r := NewReport()
		r.Failures = []Failure{{Seed: last, Problem: fmt.Sprintf("its process ended: %v", err), Log: output.String()}}
		take(r)
	}
}

// TestWorker is what runs in a worker.
func TestWorker(t *testing.T) {
	if *workerFlag == "" {
		return // not a worker
	}
	var s share
	if err := json.Unmarshal([]byte(*workerFlag), &s); err != nil {
		t.Fatal(err)
	}
	debug.SetGCPercent(400)
	encoder := json.NewEncoder(os.NewFile(3, "reports"))
	say := func(m message) {
		if err := encoder.Encode(m); err != nil {
			t.Fatal(err)
		}
	}
	dir := fastDir(t)
	total := NewReport()
	for i := 0; s.N == 0 || i < s.N; i++ {
		if !s.Until.IsZero() && time.Now().After(s.Until) {
			break
		}
		seed := s.First + uint64(i)*s.Step
		say(message{Start: seed})
		if s.Die {
			panic("told to die")
		}
		total.Add(runSeed(t, seed, dir, s.Linear))
		if i%50 == 49 || len(total.Failures) > 0 {
			say(message{Report: total})
			total = NewReport()
		}
	}
	say(message{Report: total})
}

// runSeed runs one seed in this process.
func runSeed(t *testing.T, seed uint64, dir string, linear bool) *Report {
	// One in four may run in parallel.
	defer goruntime.GOMAXPROCS(goruntime.GOMAXPROCS(1 + btoi(seed%4 == 0)))
	watchdog := time.AfterFunc(hangLimit, func() {
		stacks := make([]byte, 4<<20)
		_, _ = fmt.Fprintf(os.Stderr, "seed %d has not ended after %v\n%s\n", seed, hangLimit, stacks[:goruntime.Stack(stacks, true)])
		os.Exit(3)
	})
	defer watchdog.Stop()
	if linear {
		return RunLinear(t, seed, dir)
	}
	return Run(t, seed, dir)
}

// fastDir returns a directory in memory, if there is one: bbolt syncs.
func fastDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "workspaced-sim-")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	return dir
}

// fail prints each failure, with the command that runs its seed again.
func fail(t *testing.T, r *Report, test string) {
	t.Helper()
	for _, f := range r.Failures {
		t.Errorf("seed %d: %s\n\n%s\nseed %d: %s\nagain: go test ./server/servertest/sim -run '^%s$' -seed=%d",
			f.Seed, f.Problem, lastLines(f.Log, 1500), f.Seed, f.Problem, test, f.Seed)
	}
}

func lastLines(text string, n int) string {
	lines := strings.SplitAfter(text, "\n")
	if len(lines) <= n {
		return text
	}
	return fmt.Sprintf("(%d lines left out)\n%s", len(lines)-n, strings.Join(lines[len(lines)-n:], ""))
}

// A worker whose process dies is a failure of the seed that it ran.
func TestWorkerDies(t *testing.T) {
	total := NewReport()
	runWorker(t, share{First: 7, Step: 1, N: 2, Die: true}, total.Add)
	if len(total.Failures) != 1 || total.Failures[0].Seed != 7 || !strings.Contains(total.Failures[0].Log, "told to die") {
		t.Errorf("got %+v", total.Failures)
	}
}
