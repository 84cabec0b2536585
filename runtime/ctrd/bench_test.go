package ctrd_test

import (
	"fmt"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
)

// BenchmarkCycle measures one cycle: prepare, switch, remove. Its metrics are
// medians: of the downtime, from the old process's end (Stop has returned) to
// the new one's exec (Start has returned), of the stop before it, and of all.
// The environment has 100 secrets, the user is not root, the root read-only.
func BenchmarkCycle(b *testing.B) {
	for _, version := range []string{ctrdtest.System, ctrdtest.V23} {
		b.Run(version, func(b *testing.B) {
			bb := newBench(b, ctrdtest.StartContainerd(b, version))
			s := spec()
			s.User, s.ReadOnlyRoot = ctrdtest.UserName, true
			var env []string
			for i := range 100 {
				env = append(env, fmt.Sprintf("SECRET_%d=%064d", i, i))
			}
			old := bb.run(s, env...)
			var prepare, stop, down, remove, all []time.Duration
			for b.Loop() {
				begin := time.Now()
				next := bb.prepare(s)
				launch := runtime.Launch{Generation: 1, Env: env}
				if err := bb.d.Arm(bb.ctx(), next.ID, launch); err != nil {
					b.Fatal(err)
				}
				prepared := time.Now()
				if err := bb.d.Stop(bb.ctx(), old.ID, syscall.SIGTERM, time.Minute); err != nil {
					b.Fatal(err)
				}
				stopped := time.Now()
				started, err := bb.d.Start(bb.ctx(), next.ID, launch)
				if err != nil {
					b.Fatal(err)
				}
				runs := time.Now()
				if err := bb.d.Remove(bb.ctx(), old.ID); err != nil {
					b.Fatal(err)
				}
				removed := time.Now()
				prepare = append(prepare, prepared.Sub(begin))
				stop = append(stop, stopped.Sub(prepared))
				down = append(down, runs.Sub(stopped))
				remove = append(remove, removed.Sub(runs))
				all = append(all, removed.Sub(begin))
				old = started
				ctrdtest.AwaitReady(b, old.PID)
			}
			for name, durations := range map[string][]time.Duration{"prepare": prepare, "stop": stop, "down": down, "remove": remove, "cycle": all} {
				slices.Sort(durations)
				b.ReportMetric(float64(durations[len(durations)/2].Microseconds())/1000, name+"-ms")
				if name == "down" {
					b.ReportMetric(float64(durations[len(durations)*95/100].Microseconds())/1000, name+"-p95-ms")
				}
			}
			bb.nothingLeft()
		})
	}
}
