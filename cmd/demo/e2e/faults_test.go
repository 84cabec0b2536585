package e2e

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"
	"time"

	"github.com/workspaced/workspaced/cmd/internal/lab"
	"github.com/workspaced/workspaced/runtime/ctrd"
	"github.com/workspaced/workspaced/runtime/runtimetest/fault"
	"github.com/workspaced/workspaced/server/workspace"
	"github.com/workspaced/workspaced/store"
)

// faulty is a fleet whose daemon fails by rules that change while it runs.
type faulty struct {
	*fleet
	bystander identity
	release   func() // lets a pull go on
}

// The workspaces of a faulty fleet. Nobody touches the bystander; what makes the
// daemon fail is done to the subject, while the other one has something to do as
// well. The extra one comes and goes.
const (
	bystander = "bystander"
	subject   = "subject"
	other     = "other"
	extra     = "extra"
)

func newFaulty(t *testing.T, timeout time.Duration) *faulty {
	t.Helper()
	s := &faulty{fleet: newFleet(t, timeout, lab.Options{Faults: true, OwnContainerd: true})}
	for _, name := range []string{bystander, subject, other} {
		s.add(name, map[string]string{"A": "0"})
	}
	s.verify()
	s.bystander = s.identity(s.id(bystander))
	return s
}

// arm puts rules into force; none: nothing fails any more.
func (s *faulty) arm(rules ...fault.Rule) {
	s.t.Helper()
	var text []string
	for _, r := range rules {
		text = append(text, r.String())
	}
	if err := s.Daemon.SetFaults(text...); err != nil {
		s.t.Fatal(err)
	}
}

// push makes an image that the daemon does not have, and a program in it that
// passes every check and can't be executed.
func (s *faulty) push() (ref string) {
	s.t.Helper()
	img, err := s.Image(s.next())
	if err == nil {
		img, err = lab.AddFile(img, "broken", 0o755, brokenProgram())
	}
	if err == nil {
		ref, err = s.Registry.Push(s.ctx, img, "demo:"+s.next())
	}
	if err != nil {
		s.t.Fatal(err)
	}
	return ref
}

// brokenProgram is the head of a program for this machine, and nothing else.
func brokenProgram() []byte {
	self, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		panic(err)
	}
	head := slices.Clone(self[:64])
	head[56], head[57] = 0, 0 // no program headers
	return head
}

// Issue item 1, end to end: the daemon kills itself before and after each step of
// each effect, as kill -9 would. After its next start everything that was
// acknowledged is there, every workspace has exactly the container that it should
// have, who had nothing to do was left alone, and nothing is left behind. A short run
// has the time for some of all points, other ones each time; the long one
// (WORKSPACED_SOAK) takes all, and so can be asked for a single one with -run.
func TestContract08_KilledAtEveryStep(t *testing.T) {
	var points []fault.Point
	for _, step := range steps(t) {
		for _, moment := range fault.Moments {
			points = append(points, fault.Point{Step: step, Moment: moment})
		}
	}
	if soakTime() == 0 {
		for len(points) > 24 {
			i := rand.IntN(len(points))
			points = slices.Delete(points, i, i+1)
		}
	}
	s := newFaulty(t, 20*time.Minute)
	failed := 0
	for _, p := range points {
		if !t.Run(fmt.Sprintf("%s %s", p.Moment, p.Step), func(t *testing.T) {
			s.on(t)
			s.killAt(p)
		}) {
			failed++
		}
		if failed > 5 {
			t.Fatal("too much fails to go on")
		}
	}
}

func (s *faulty) killAt(p fault.Point) {
	a, ok := acts[p.Step]
	if !ok {
		a = actSecret
	}
	maybe := func(do func(*faulty)) {
		if do != nil {
			do(s)
		}
	}
	maybe(a.before)
	s.arm(fault.Rule{Step: p.Step, Moment: p.Moment, Action: fault.Kill, Times: 1})
	a.during(s)
	ctx, cancel := context.WithTimeout(s.ctx, 20*time.Second)
	defer cancel()
	if err := s.Daemon.WaitKilled(ctx); err != nil {
		s.t.Fatalf("the step is never passed: %v", err)
	}
	s.arm()
	s.start()
	maybe(a.after)
	s.verify()
	if now := s.identity(s.id(bystander)); now != s.bystander {
		s.t.Fatalf("the bystander was restarted: %+v, was %+v", now, s.bystander)
	}
	if a.restore != nil {
		a.restore(s)
		s.verify()
	}
}

// stopSteps end a container, in a switch or in a clean-up. They fail one by one,
// so that it is in a switch.
var stopSteps = []string{"record.stopping", "pidfd.signal", "pidfd.wait"}

// cleanUpSteps are those of a clean-up alone. One that fails is tried again after
// half a minute, so only the long run has the time.
var cleanUpSteps = []string{
	"standby.drop", "record.removing", "task.delete", "sockets.remove", "container.delete", "snapshot.remove", "runc.remove", "cgroup.remove", "instance.remove",
}

// Promise 7, end to end: each step of a cycle fails once, hangs until its
// deadline, or panics, each time the next one, while changes go on. The daemon
// lives, and in the end every workspace has all of its changes, nobody else was
// touched, and nothing is left behind.
func TestContract07_FailsAtEveryStep(t *testing.T) {
	for _, action := range []fault.Action{fault.Error, fault.Panic, fault.Hang} {
		t.Run(string(action), func(t *testing.T) {
			s := newFaulty(t, 5*time.Minute)
			pid := s.Daemon.PID()
			var rules []fault.Rule
			for _, step := range steps(t) {
				_, elsewhere := acts[step]
				if elsewhere || step == "store.commit" || (soakTime() == 0 && slices.Contains(cleanUpSteps, step)) {
					continue // a commit that fails is its caller's to repeat; the store's tests have it
				}
				for _, moment := range fault.Moments {
					if action == fault.Hang && moment == fault.After && soakTime() == 0 {
						continue // takes its time, and is an error in the end
					}
					r := fault.Rule{Step: step, Moment: moment, Action: action, Times: 1}
					if !slices.Contains(stopSteps, step) {
						rules = append(rules, r)
						continue
					}
					s.strike(r)
				}
			}
			s.strike(rules...)
			s.verify()
			if now := s.identity(s.id(bystander)); now != s.bystander {
				t.Errorf("the bystander was restarted: %+v, was %+v", now, s.bystander)
			}
			if s.Daemon.PID() != pid {
				t.Errorf("the daemon is another one: pid %d, was %d", s.Daemon.PID(), pid)
			}
		})
	}
}

// strike puts rules into force, changes secrets until all have struck, and lets
// everything heal.
func (s *faulty) strike(rules ...fault.Rule) {
	s.t.Helper()
	before, err := s.Daemon.Struck()
	if err != nil {
		s.t.Fatal(err)
	}
	s.arm(rules...)
	ctx, cancel := context.WithTimeout(s.ctx, 90*time.Second)
	defer cancel()
	s.poll(ctx, func() error {
		actSecret.during(s) // cuts the wait after a failure short
		struck, err := s.Daemon.Struck()
		if err != nil {
			return err
		}
		for i, r := range rules {
			if p := fmt.Sprintf("%s:%s:%s", r.Step, r.Moment, r.Action); struck[p] == before[p] {
				return fmt.Errorf("rule %d of %d, %v, has not struck", i, len(rules), r)
			}
		}
		return nil
	})
	s.arm()
	for _, name := range []string{subject, other} {
		s.asked[name].again = true // one that started and whose start then failed was ended
	}
	s.heal(subject, other)
}

// heal changes workspaces until they are what was asked for: a fault that was in
// flight may still have failed a cycle, and after so many failures the wait for
// the next attempt is long. A change cuts it short.
func (s *faulty) heal(names ...string) {
	s.t.Helper()
	for _, name := range names {
		var changed time.Time
		s.poll(s.ctx, func() error {
			_, err := s.look(s.ctx, name)
			if err != nil && time.Since(changed) > time.Second {
				s.setSecret(name, "A", s.next())
				changed = time.Now()
			}
			return err
		})
	}
}

// steps are all steps of the daemon, in the order of a cycle.
func steps(t *testing.T) []string {
	all := slices.Concat(store.Steps, workspace.Steps, ctrd.Steps)
	if sorted := slices.Sorted(slices.Values(all)); len(slices.Compact(sorted)) != len(all) {
		t.Fatalf("two steps have one name: %v", all)
	}
	return all
}
