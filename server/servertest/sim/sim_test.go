package sim

import (
	"flag"
	"fmt"
	"os"
	goruntime "runtime"
	"testing"
	"time"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

var (
	seedFlag  = flag.Uint64("seed", 0, "run this one seed here, and print its log if it fails")
	seedsFlag = flag.Int("seeds", 0, "run so many seeds")
	firstFlag = flag.Uint64("first", 1, "the first of them")
	soakFlag  = flag.Duration("soak", 0, "run seeds that nobody has run before, for so long")
)

// Seeds of a plain test run, bounded for `make test` with the race detector.
const (
	defaultSeeds  = 120
	defaultLinear = 60
)

func TestSeeds(t *testing.T)  { run(t, defaultSeeds, false) }
func TestLinear(t *testing.T) { run(t, defaultLinear, true) }

func run(t *testing.T, n int, linear bool) {
	if *seedFlag > 0 {
		fail(t, runSeed(t, *seedFlag, fastDir(t), linear), t.Name())
		return
	}
	s := share{First: *firstFlag, N: n, Linear: linear}
	if *seedsFlag > 0 {
		s.N = *seedsFlag
	}
	start := time.Now()
	if *soakFlag > 0 {
		part := *soakFlag * 3 / 4
		if linear {
			part = *soakFlag / 4
		}
		s.First, s.N, s.Until = uint64(start.Unix())<<24, 0, start.Add(part)
	}
	r := runShares(t, s, goruntime.NumCPU())
	if testing.Verbose() || *soakFlag > 0 || *seedsFlag > 0 {
		r.Write(os.Stdout)
		_, _ = fmt.Printf("%v, first seed %d\n", time.Since(start).Round(time.Millisecond), s.First)
	}
	fail(t, r, t.Name())
	if r.Seeds == 0 || s.N > 0 && r.Seeds < s.N {
		t.Errorf("%d seeds of %d were run", r.Seeds, s.N)
	}
	if !linear {
		checkCoverage(t, r)
	}
	if linear && len(r.Undecided)*50 > r.Histories {
		t.Errorf("%d of %d histories are undecided", len(r.Undecided), r.Histories)
	}
}

// checkCoverage: a simulation that leaves something out sees nothing there.
func checkCoverage(t *testing.T, r *Report) {
	t.Helper()
	if r.Seeds < 100 {
		return
	}
	service := workspacev1.File_workspace_v1_workspace_control_proto.Services().ByName("WorkspaceControl")
	for i := range service.Methods().Len() {
		method := string(service.Methods().Get(i).Name())
		if r.Calls[method]["OK"] == 0 {
			t.Errorf("%s was never done", method)
		}
	}
	if r.Crashes == 0 || r.Shutdowns == 0 || r.Exits == 0 || r.Jumps == 0 || r.Resumed == 0 {
		t.Errorf("crashes, shutdowns, exits, clock jumps or resumed watches are missing: %+v", r)
	}
	if missed := r.Missed(); r.Seeds >= 10_000 && len(missed) > 0 {
		t.Errorf("faults that never struck: %v", missed)
	}
}
