package store

import (
	"cmp"
	"maps"
	"slices"
	"time"
)

// cleanLabels returns a copy in which empty is nil, as after storing.
func cleanLabels(labels map[string]string) map[string]string {
	if len(labels) == 0 {
		return nil
	}
	return maps.Clone(labels)
}

// cleanSpec returns a deep copy in which empty is nil, as after storing: what
// is equal then is equal.
func cleanSpec(s Spec) Spec {
	s.Command = cleanSlice(s.Command)
	s.Args = cleanSlice(s.Args)
	s.Env = cleanLabels(s.Env)
	s.Volumes = cleanSlice(s.Volumes)
	s.ModelEnv = cleanSlice(s.ModelEnv)
	if s.StopGrace != nil {
		grace := *s.StopGrace
		s.StopGrace = &grace
	}
	return s
}

func cleanSlice[T any](s []T) []T {
	if len(s) == 0 {
		return nil
	}
	return slices.Clone(s)
}

// seenByContainer leaves out what only the daemon looks at, and says the same
// thing in one way.
func seenByContainer(s Spec) Spec {
	s = cleanSpec(s)
	s.LiveSignal = ""
	s.StopSignal = ""
	s.StopGrace = nil
	s.CrashPolicy = CrashPolicy{}
	s.ModelEnv = s.ModelVars()
	s.SecretDelivery = cmp.Or(s.SecretDelivery, DeliveryEnv)
	s.Security = cmp.Or(s.Security, SecurityRestricted)
	return s
}

// utcStatus returns the status with its times as they are stored, so that equal
// instants are equal.
func utcStatus(st Status) Status {
	if st.Running != nil {
		r := *st.Running
		r.StartTime = utc(r.StartTime)
		st.Running = &r
	}
	if st.Token != nil {
		t := *st.Token
		st.Token = &t
	}
	if st.LastExit != nil {
		e := *st.LastExit
		e.Time = utc(e.Time)
		st.LastExit = &e
	}
	if st.Failure != nil {
		f := *st.Failure
		f.Time, f.NextAttempt = utc(f.Time), utc(f.NextAttempt)
		st.Failure = &f
	}
	return st
}

func utc(t time.Time) time.Time { return t.UTC().Round(0) }
