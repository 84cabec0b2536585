package access

import (
	"fmt"

	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
	"google.golang.org/protobuf/types/descriptorpb"

	workspacev1 "github.com/workspaced/workspaced/gen/workspace/v1"
)

// Rule says who may call an RPC. The zero value is nobody.
type Rule struct {
	// Roles are those declared for it, and any those that contain one of them.
	Roles []workspacev1.Role
	any   Roles
	// Target is what a scope is held against.
	Target workspacev1.AccessTarget
	// Exposure is for RPCs of other services, which have no roles.
	Exposure Exposure
}

// Exposure says who may call services that are not ours: health and reflection.
type Exposure string

// The exposures. The zero value is ExposureAuthenticated.
const (
	// ExposurePublic: who can connect.
	ExposurePublic Exposure = "public"
	// ExposureAuthenticated: who has a role, whichever it is.
	ExposureAuthenticated Exposure = "authenticated"
	// ExposureOff: nobody, the service is not there.
	ExposureOff Exposure = "off"
)

// Policy has a Rule for each RPC, by full method name. What it does not have is
// denied.
type Policy map[string]*Rule

// Declare adds the RPCs of a service with what the .proto declares for them.
func (p Policy) Declare(service protoreflect.ServiceDescriptor) {
	methods := service.Methods()
	for i := range methods.Len() {
		m := methods.Get(i)
		rule := &Rule{}
		options, _ := m.Options().(*descriptorpb.MethodOptions)
		if declared, ok := proto.GetExtension(options, workspacev1.E_Access).(*workspacev1.Access); ok {
			rule.Roles = declared.GetRoles()
			rule.Target = declared.GetTarget()
		}
		rule.any = AnyOf(rule.Roles...)
		if len(rule.Roles) > 0 && rule.any != RolesOf(workspacev1.Role_ROLE_WORKSPACE) {
			rule.any |= RolesOf(workspacev1.Role_ROLE_ADMIN)
		}
		p[FullMethod(m)] = rule
	}
}

// Expose adds the RPCs of a service that has no roles.
func (p Policy) Expose(service protoreflect.ServiceDescriptor, exposure Exposure) {
	if exposure == "" {
		exposure = ExposureAuthenticated
	}
	methods := service.Methods()
	for i := range methods.Len() {
		p[FullMethod(methods.Get(i))] = &Rule{Exposure: exposure}
	}
}

// FullMethod is a method's name as gRPC has it.
func FullMethod(m protoreflect.MethodDescriptor) string {
	return fmt.Sprintf("/%s/%s", m.Parent().FullName(), m.Name())
}

// Admit decides, before anything of the request is looked at, whether the subject
// may call the RPC at all: whether it has one of its roles, wherever that may be.
// Whether it has it for what the request is about, the rule's Check decides.
func (p Policy) Admit(method string, id *Identity) (*Rule, error) {
	if id.Err != nil {
		return nil, id.Err
	}
	if err := id.check(); err != nil { // since the call began: its request may have been long in coming
		return nil, err
	}
	rule := p[method]
	switch {
	case rule != nil && rule.Exposure == ExposurePublic:
		return rule, nil
	case id.Subject.Name == "":
		return nil, &UnauthenticatedError{Why: "no credentials"}
	case rule == nil, rule.Exposure == ExposureOff:
		return nil, &DeniedError{Subject: id.Subject.Name}
	case rule.Exposure == ExposureAuthenticated:
		if len(id.Subject.Grants) == 0 {
			return nil, deny(&id.Subject, []workspacev1.Role{workspacev1.Role_ROLE_VIEWER}, Target{})
		}
		return rule, nil
	}
	for i := range id.Subject.Grants {
		if id.Subject.Grants[i].Roles&rule.any != 0 {
			return rule, nil
		}
	}
	return nil, deny(&id.Subject, rule.Roles, Target{})
}

// Check returns nil if the subject may call the RPC about the target, or a
// *DeniedError.
func (r *Rule) Check(s *Subject, t Target) error {
	if s.May(r.any, t) {
		return nil
	}
	return deny(s, r.Roles, t)
}

// View is what the subject may call the RPC about.
func (r *Rule) View(s *Subject) View { return s.View(r.any) }
