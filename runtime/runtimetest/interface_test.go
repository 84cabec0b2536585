package runtimetest_test

import (
	"github.com/workspaced/workspaced/runtime/runtimetest"
	"github.com/workspaced/workspaced/server/workspace"
)

var (
	_ workspace.Runtime   = (*runtimetest.Fake)(nil)
	_ workspace.Runtime   = (*runtimetest.Daemon)(nil)
	_ workspace.Runtime   = runtimetest.Runtime(nil) // the same methods, both ways
	_ runtimetest.Runtime = workspace.Runtime(nil)
)
