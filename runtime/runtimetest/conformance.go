package runtimetest

import (
	"testing"
)

// property is one thing that every runtime promises.
type property struct {
	name string
	test func(s *suite)
}

// Conformance tests that a runtime keeps what workspace.Runtime promises. Each
// property is a subtest, in a world of its own, named after the property.
func Conformance(t *testing.T, h Harness) {
	groups := []struct {
		name       string
		properties []property
	}{
		{"EnsureImage", imageProperties},
		{"Prepare", prepareProperties},
		{"Arm", armProperties},
		{"Start", startProperties},
		{"Rotate", rotateProperties},
		{"Stop", stopProperties},
		{"Watch", watchProperties},
		{"Remove", removeProperties},
		{"List", listProperties},
		{"Crash", crashProperties},
		{"Container", containerProperties},
		{"Workspace", workspaceProperties},
	}
	for _, group := range groups {
		t.Run(group.name, func(t *testing.T) {
			for _, p := range group.properties {
				t.Run(p.name, func(t *testing.T) {
					if why := h.Skip[p.name]; why != "" {
						t.Skipf("NOT TESTED: %s", why)
					}
					p.test(newSuite(t, h))
				})
			}
		})
	}
}
