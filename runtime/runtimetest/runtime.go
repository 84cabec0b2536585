// Package runtimetest tests what speaks the language of package runtime: Fake is
// a runtime in memory, for tests of what calls one, and Conformance is the suite
// that Fake and every driver pass, so that what was tested against the one holds
// with the other.
package runtimetest

import (
	"context"
	"syscall"
	"time"

	"github.com/workspaced/workspaced/runtime"
)

// Runtime is what the suite asks of a driver. Its methods are those of
// workspace.Runtime, where their meaning is written down.
type Runtime interface {
	EnsureImage(ctx context.Context, ref string) (digest string, err error)
	Prepare(ctx context.Context, spec runtime.Spec) (runtime.Instance, error)
	Arm(ctx context.Context, id string, launch runtime.Launch) error
	Start(ctx context.Context, id string, launch runtime.Launch) (runtime.Instance, error)
	Rotate(ctx context.Context, id string, rotation runtime.Rotation) (runtime.Instance, error)
	Stop(ctx context.Context, id string, signal syscall.Signal, grace time.Duration) error
	// ended may be called before Watch returns, and is not after stop has.
	Watch(ctx context.Context, id string, ended func(runtime.Exit)) (stop func(), err error)
	Remove(ctx context.Context, id string) error
	// After an error, List has those that it knows of all the same, with what could
	// not be asked as PhaseUnknown, or none.
	List(ctx context.Context, uid string) ([]runtime.Instance, error)
	// Foreign counts the containers that are kept where this daemon keeps its own
	// and are not its own, by the uid of the daemon (its database) that they belong
	// to; "" for those that name none. No method ever touches one.
	Foreign(ctx context.Context) (map[string]int, error)
	RemoveWorkspace(ctx context.Context, id, uid string, keepVolumes bool) error
}

// Method names a method of Runtime.
type Method string

// The methods.
const (
	EnsureImage     Method = "EnsureImage"
	Prepare         Method = "Prepare"
	Arm             Method = "Arm"
	Start           Method = "Start"
	Rotate          Method = "Rotate"
	Stop            Method = "Stop"
	Watch           Method = "Watch"
	Remove          Method = "Remove"
	List            Method = "List"
	Foreign         Method = "Foreign"
	RemoveWorkspace Method = "RemoveWorkspace"
)

// Wait returns how an instance ended once it has, or ctx's error.
func Wait(ctx context.Context, r Runtime, id string) (runtime.Exit, error) {
	exits := make(chan runtime.Exit, 1)
	stop, err := r.Watch(ctx, id, func(exit runtime.Exit) { exits <- exit })
	if err != nil {
		return runtime.Exit{}, err
	}
	defer stop()
	select {
	case exit := <-exits:
		return exit, nil
	case <-ctx.Done():
		return runtime.Exit{}, ctx.Err()
	}
}
