package access

import (
	"fmt"
	"strings"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// UnauthenticatedError says why a call's credentials count for nothing.
type UnauthenticatedError struct {
	// Token: a token was sent. The caller learns no more than that it is none.
	Token bool
	// Why is for the operator, in log and audit, and never for the caller: it tells
	// a token that has ended from one that never was.
	Why string
}

func (e *UnauthenticatedError) Error() string { return "unauthenticated: " + e.Why }

// DeniedError says which role is missing.
type DeniedError struct {
	// Subject is who was denied, empty: nobody.
	Subject string
	// Roles are those of which one is missing; none: the RPC is denied to all.
	Roles []workspacev1.Role
	// Target is for what it is missing. Whether that exists the error does not say.
	Target Target
	// Elsewhere: the subject has such a role, but for something else.
	Elsewhere bool
}

func (e *DeniedError) Error() string {
	if len(e.Roles) == 0 {
		return "this is open to nobody"
	}
	role := strings.Join(RoleNames(e.Roles), " or ")
	if !e.Elsewhere {
		return fmt.Sprintf("%s lacks the role %s", e.Subject, role)
	}
	if e.Target.ID == "" {
		return fmt.Sprintf("%s has the role %s for some workspaces only, and this concerns all", e.Subject, role)
	}
	return fmt.Sprintf("%s lacks the role %s for workspaces/%s", e.Subject, role, e.Target.ID)
}

func deny(s *Subject, roles []workspacev1.Role, t Target) *DeniedError {
	e := &DeniedError{Subject: s.Name, Roles: roles, Target: Target{ID: t.ID}}
	for i := range s.Grants {
		e.Elsewhere = e.Elsewhere || s.Grants[i].Roles&AnyOf(roles...) != 0
	}
	return e
}
