package ctrd_test

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/workspaced/workspaced/runtime"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/runtime/ctrd/ctrdtest"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
)

// faultCase is one fault in a workspace's life.
type faultCase struct {
	fault.Rule
	// reopen: the daemon is another one after the fault, as if it had died of it;
	// else the same one tries again.
	reopen bool
}

func (c faultCase) String() string {
	if c.reopen {
		return c.Rule.String() + ":reopen"
	}
	return c.Rule.String()
}

var faultActions = []fault.Action{fault.Error, fault.Hang, fault.Panic}

// faultCases are all steps, each with an error, a hang and a panic before it is
// done and after. A panic is taken to have killed the daemon.
func faultCases() []faultCase {
	var cases []faultCase
	for _, step := range ctrd.Steps {
		for _, moment := range fault.Moments {
			for _, action := range faultActions {
				rule := fault.Rule{Step: step, Moment: moment, Action: action, Times: 1}
				cases = append(cases, faultCase{rule, action == fault.Panic})
			}
		}
	}
	return cases
}

// someFaultCases are one for each point, of half of the points: which of its faults is
// drawn anew each time, since a short run has no time for all.
func someFaultCases(half int) (some []faultCase) {
	all := faultCases()
	for point := range slices.Chunk(all, len(faultActions)) {
		c := point[rand.IntN(len(point))]
		if (slices.Index(ctrd.Steps, c.Step)+len(c.Moment))%2 == half {
			some = append(some, c)
		}
	}
	return some
}

// faultsLong makes the matrix run in full, which takes a quarter of an hour on a
// machine that does nothing else.
const faultsLong = "WORKSPACED_FAULTS_LONG"

// allFaultCases are those of faultCases, each tried again and survived by another
// daemon, at the first and the second time that the step is passed.
func allFaultCases() (all []faultCase) {
	for _, c := range faultCases() {
		for c.Skip = range 2 {
			for _, c.reopen = range []bool{false, true} {
				all = append(all, c)
			}
		}
	}
	return all
}

// Whatever step fails, hangs or panics: what runs goes on until it is replaced,
// the next attempt succeeds, and nothing else is left.
func TestContract08_EveryStepFails(t *testing.T) {
	before := openFiles()
	var mu sync.Mutex
	struck := make(map[fault.Point]bool)
	t.Run("on", func(t *testing.T) {
		for i, version := range []string{ctrdtest.System, ctrdtest.V23} {
			cases := someFaultCases(i)
			if os.Getenv(faultsLong) != "" {
				cases = allFaultCases()
			}
			t.Run(version, func(t *testing.T) {
				t.Parallel()
				c := ctrdtest.StartContainerd(t, version)
				registry, image := ctrdtest.StartRegistry(t, ctrdtest.Plain), ctrdtest.TestImage(t)
				archive := ctrdtest.SaveImage(t, imageRef, image)
				const lives = 4
				queue := make(chan faultCase, len(cases))
				for _, c := range cases {
					queue <- c
				}
				close(queue)
				var all sync.WaitGroup
				defer all.Wait()
				for number := range lives { // most of their time they hang
					all.Go(func() {
						t.Run(fmt.Sprint("life ", number), func(t *testing.T) {
							l := newLife(t, c, registry, image, archive)
							defer l.end()
							for c := range queue {
								if l.suffer(c) {
									mu.Lock()
									struck[fault.Point{Step: c.Step, Moment: c.Moment}] = true
									mu.Unlock()
								}
							}
						})
					})
				}
			})
		}
	})
	if t.Failed() || len(struck) == 0 {
		return // or there is no containerd here
	}
	for _, c := range faultCases() {
		if p := (fault.Point{Step: c.Step, Moment: c.Moment}); !struck[p] {
			t.Errorf("nothing failed %s %s", p.Moment, p.Step)
		}
	}
	ctrdtest.Eventually(t, "no goroutine of a driver is left", func() bool { return !strings.Contains(goroutines(), "workspaced/runtime/ctrd.") })
	ctrdtest.Eventually(t, "no file is open that was not before", func() bool {
		after := openFiles()
		for kind, n := range after {
			if n > before[kind] {
				t.Logf("%d open: %s, %d before", n, kind, before[kind])
				return false
			}
		}
		return true
	})
}

// suffer lets the fault happen while the workspace goes to its next generation,
// and reports whether it did.
func (l *life) suffer(c faultCase) (struck bool) {
	l.Helper()
	begin, old := time.Now(), l.running
	switch c.Step {
	case "task.get", "task.kill", "container.get":
		l.loseRecord(old.ID) // then nobody but containerd knows the process
	case "user.find", "container.list":
		l.end() // each process finds out once
		l.open()
	}
	l.arm(c)
	// Who waits may come too late for the end, and containerd's garbage collector
	// removes a snapshot now and then before the driver does. On a slow machine a wait
	// may be given up before the end that it waits for, which the next attempt finds.
	for l.try = 0; l.try < 5 && !l.struck(); l.try++ {
		switch c.Step {
		case "image.import":
			l.until("the import", func(ctx context.Context) error {
				_, err := l.d.ImportFile(ctx, l.archive)
				return err
			})
		case "snapshot.stat": // of an image that was there before
			l.until("the image", func(ctx context.Context) error {
				_, err := l.d.EnsureImage(ctx, l.spec.Image)
				return err
			})
		case "log.remove", "volumes.remove", "parent.remove":
			l.remove()
		}
		l.reach()
	}
	struck = l.struck()
	if !struck && c.Skip == 0 {
		l.Errorf("%v: it did not happen", c)
	}
	l.arm(faultCase{})
	l.check(c, old)
	if testing.Verbose() {
		l.Logf("%v took %v", c, time.Since(begin))
	}
	return struck
}

// arm makes the fault of c happen from now on, and no other.
func (l *life) arm(c faultCase) {
	rules := []fault.Rule{c.Rule}
	switch c.Step {
	case "shim.end", "bundle.remove": // of what is half made only
		rules = append(rules, fault.Rule{Step: "record.process", Moment: fault.Before, Action: fault.Error, Times: 1})
	case "record.undo": // of what did not start only
		rules = append(rules, fault.Rule{Step: "fifo.write", Moment: fault.After, Action: fault.Error, Times: 1})
	}
	l.fault, l.rules, l.reopened = c, rules, false
	l.strikes = l.in.Strikes()[l.strike()]
	l.in.Set(rules...)
}

func (l *life) strike() fault.Strike {
	return fault.Strike{Point: fault.Point{Step: l.fault.Step, Moment: l.fault.Moment}, Action: l.fault.Action}
}

// struck tells whether the fault has happened.
func (l *life) struck() bool { return l.in.Strikes()[l.strike()] > l.strikes }

// until calls f as an actor does, again after each failure.
func (l *life) until(what string, f func(context.Context) error) {
	l.Helper()
	var err error
	for attempt := range 12 {
		timeout := 20 * time.Second
		if l.fault.Action == fault.Hang { // not for so long, but for as long as a slow machine needs
			timeout = min(400*time.Millisecond<<(attempt+l.try), timeout)
		}
		ctx, cancel := context.WithTimeout(context.Background(), timeout)
		err = survive(func() error { return f(ctx) })
		cancel()
		if err == nil {
			return
		}
		l.checkError(err)
		l.checkOpen(" (deleted)")
		if l.fault.reopen && l.struck() && !l.reopened {
			l.reopened = true
			l.end()
			l.open()
		}
	}
	l.Fatalf("%v: %s: %v", l.fault, what, err)
}

// survive recovers an injected panic, as an actor does with any.
func survive(f func() error) (err error) {
	defer func() {
		if p := recover(); p != nil {
			cause, ok := p.(error)
			if !ok || !errors.Is(cause, fault.ErrInjected) {
				panic(p)
			}
			err = fmt.Errorf("panic: %w", cause)
		}
	}()
	return f()
}

// checkError wants an injected error to come back with a reason and its step's
// name.
func (l *life) checkError(err error) {
	l.Helper()
	var known *runtime.Error
	if !errors.Is(err, fault.ErrInjected) || strings.HasPrefix(err.Error(), "panic: ") {
		return
	}
	named := slices.ContainsFunc(l.rules, func(r fault.Rule) bool { return strings.Contains(err.Error(), r.Step) })
	if !errors.As(err, &known) || !named {
		l.Errorf("%v: error %v has no reason, or names no step", l.fault, err)
	}
}
